"""The wire contract: every tensor of the ``dspark`` model, in one table.

The request builder, the Triton adapter and the test of ``model_repository/dspark/config.pbtxt`` all read these rows, so
a tensor is added by adding a line here (and to config.pbtxt, which a test compares).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Datatype = Literal["BYTES", "BOOL", "INT32", "INT64", "UINT64", "FP32"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: ``shape`` is (1,) for a scalar and (-1,) for a list of any length. Text is UTF-8 in BYTES."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    doc: str

    @property
    def scalar(self) -> bool:
        return self.shape == (1,)


INPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text_input", "BYTES", (1,), "the prompt as text"),
    TensorSpec("input_ids", "INT32", (-1,), "the prompt as token ids, instead of text_input"),
    TensorSpec("messages", "BYTES", (1,), "the prompt as a JSON list of chat messages, instead of text_input"),
    TensorSpec("max_tokens", "INT32", (1,), "most tokens to generate"),
    TensorSpec("min_tokens", "INT32", (1,), "no end before this many tokens"),
    TensorSpec("stream", "BOOL", (1,), "a response for every step (true), or one with everything (false, default)"),
    TensorSpec("exclude_input_in_output", "BOOL", (1,), "false puts the prompt before the answer; default true"),
    TensorSpec("temperature", "FP32", (1,), "0 (default) is greedy"),
    TensorSpec("top_k", "INT32", (1,), "keep the k most probable tokens; 0 (default) keeps all"),
    TensorSpec("top_p", "FP32", (1,), "keep the smallest set of tokens with this probability; default 1"),
    TensorSpec("min_p", "FP32", (1,), "drop tokens below this share of the largest probability; default 0"),
    TensorSpec("repetition_penalty", "FP32", (1,), "over prompt and output; default 1"),
    TensorSpec("presence_penalty", "FP32", (1,), "over the output; default 0"),
    TensorSpec("frequency_penalty", "FP32", (1,), "over the output, per occurrence; default 0"),
    TensorSpec("seed", "UINT64", (1,), "makes sampling reproducible; default random"),
    TensorSpec("stop_words", "BYTES", (-1,), "the text ends before the first of these"),
    TensorSpec("bad_words", "BYTES", (-1,), "never generated"),
    TensorSpec("ignore_eos", "BOOL", (1,), "go on past the end-of-sequence token; default false"),
    TensorSpec("return_log_probs", "BOOL", (1,), "report the log-probability of every token; default false"),
    TensorSpec("num_return_sequences", "INT32", (1,), "answers for this prompt; default 1"),
    TensorSpec("priority", "INT32", (1,), "higher is admitted first; default 0"),
    TensorSpec("timeout_ms", "INT32", (1,), "deadline from arrival to the last token; default none"),
    TensorSpec("draft_policy", "BYTES", (1,), "off, fixed:N, threshold:P, causal or lagged; default the engine's"),
    TensorSpec("max_draft_tokens", "INT32", (1,), "most drafts verified a round; default the drafter's block size"),
)
"""All optional, but for exactly one of text_input, input_ids and messages."""

OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text_output", "BYTES", (-1,), "the next piece of text; one a sequence when stream is false"),
    TensorSpec("output_ids", "INT32", (-1,), "the tokens of this response; of all sequences one after another"),
    TensorSpec("sequence_index", "INT32", (-1,), "which sequence each text belongs to"),
    TensorSpec("output_log_probs", "FP32", (-1,), "one a token of output_ids, if asked for"),
    TensorSpec("finish_reason", "BYTES", (-1,), "stop or length; with a sequence's last response"),
    TensorSpec("num_input_tokens", "INT32", (1,), "with a sequence's last response"),
    TensorSpec("num_output_tokens", "INT32", (-1,), "with a sequence's last response"),
    TensorSpec("acceptance_rate", "FP32", (-1,), "accepted over verified draft tokens; with the last response"),
    TensorSpec("total_accepted_draft_tokens", "INT32", (-1,), "with a sequence's last response"),
    TensorSpec("total_draft_tokens", "INT32", (-1,), "proposed by the drafter; with a sequence's last response"),
    TensorSpec("total_verified_draft_tokens", "INT32", (-1,), "checked by the target; with a sequence's last response"),
    TensorSpec("num_rounds", "INT32", (-1,), "verification steps of the target; with a sequence's last response"),
    TensorSpec("arrival_time_ns", "INT64", (1,), "nanoseconds since the epoch; with a sequence's last response"),
    TensorSpec("first_scheduled_time_ns", "INT64", (-1,), "with a sequence's last response"),
    TensorSpec("first_token_time_ns", "INT64", (-1,), "with a sequence's last response"),
    TensorSpec("last_token_time_ns", "INT64", (-1,), "with a sequence's last response"),
)
"""Absent where they do not apply. With stream=true every response belongs to one sequence (length 1 everywhere but
output_ids and output_log_probs); with stream=false the one response holds all sequences in order, and
num_output_tokens splits output_ids."""
