"""What comes back: pieces of text as they come, and whole completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferResult, service_pb2

from dspark_client.errors import ServerError


@dataclass(frozen=True)
class Usage:
    """Counts and times of one finished sequence. Times are nanoseconds since the epoch, by the server's clock."""

    input_tokens: int
    output_tokens: int
    draft_tokens: int
    """Proposed by the drafter."""
    verified_draft_tokens: int
    """Checked by the target."""
    accepted_draft_tokens: int
    rounds: int
    """Verification steps of the target after prefill."""
    arrival_ns: int
    first_scheduled_ns: int
    first_token_ns: int
    last_token_ns: int

    @property
    def acceptance_rate(self) -> float:
        """Accepted over verified draft tokens; 0 where nothing was verified."""
        return self.accepted_draft_tokens / self.verified_draft_tokens if self.verified_draft_tokens else 0.0

    @property
    def time_to_first_token_s(self) -> float:
        """Seconds from the request's arrival at the server to its first token."""
        return (self.first_token_ns - self.arrival_ns) / 1e9

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first over the time they took; 0 for a single token."""
        elapsed_ns = self.last_token_ns - self.first_token_ns
        return (self.output_tokens - 1) * 1e9 / elapsed_ns if elapsed_ns > 0 else 0.0


@dataclass(frozen=True)
class Piece:
    """The next piece of one sequence; its texts joined are the sequence's whole answer.

    ``text`` may lag behind ``token_ids`` while a character or a stop string is incomplete.
    """

    sequence_index: int
    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()
    """Natural logarithms, one a token, where asked for; else empty."""
    finish_reason: str | None = None
    """``stop`` or ``length`` with the sequence's last piece."""
    usage: Usage | None = None
    """With the sequence's last piece."""


@dataclass(frozen=True)
class Completion:
    """One whole answer."""

    sequence_index: int
    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: str
    usage: Usage


def pieces_of(response: service_pb2.ModelInferResponse) -> tuple[Piece, ...]:
    """The pieces of one response: one with ``stream`` true; without it all sequences, split by num_output_tokens.

    Raises:
        ServerError: the response does not follow the schema.
    """
    try:
        result = InferResult(response)
        tensors = {output.name: result.as_numpy(output.name) for output in response.outputs}
        indices = tensors["sequence_index"].tolist()
        counts = [len(tensors["output_ids"])] if len(indices) == 1 else tensors["num_output_tokens"].tolist()
        if sum(counts) != len(tensors["output_ids"]) or len(counts) != len(indices):
            raise ValueError(f"{len(tensors['output_ids'])} token ids for sequences of {counts}")
        ends = np.cumsum(counts).tolist()
        return tuple(
            _piece(tensors, row, index, slice(end - count, end))
            for row, (index, count, end) in enumerate(zip(indices, counts, ends, strict=True))
        )
    except (KeyError, IndexError, ValueError) as error:
        raise ServerError(
            f"expected a response of the dspark model, got one this client cannot read ({error!r}); "
            "check the model's name and that client and server are of the same release"
        ) from error


def _piece(tensors: Mapping[str, npt.NDArray[np.generic]], row: int, index: int, tokens: slice) -> Piece:
    finished = "finish_reason" in tensors
    return Piece(
        sequence_index=index,
        text=tensors["text_output"].tolist()[row].decode(),
        token_ids=tuple(tensors["output_ids"][tokens].tolist()),
        log_probs=tuple(tensors["output_log_probs"][tokens].tolist()) if "output_log_probs" in tensors else (),
        finish_reason=tensors["finish_reason"].tolist()[row].decode() if finished else None,
        usage=_usage(tensors, row) if finished else None,
    )


def _usage(tensors: Mapping[str, npt.NDArray[np.generic]], row: int) -> Usage:
    return Usage(
        input_tokens=int(tensors["num_input_tokens"].item(0)),
        output_tokens=int(tensors["num_output_tokens"].item(row)),
        draft_tokens=int(tensors["total_draft_tokens"].item(row)),
        verified_draft_tokens=int(tensors["total_verified_draft_tokens"].item(row)),
        accepted_draft_tokens=int(tensors["total_accepted_draft_tokens"].item(row)),
        rounds=int(tensors["num_rounds"].item(row)),
        arrival_ns=int(tensors["arrival_time_ns"].item(0)),
        first_scheduled_ns=int(tensors["first_scheduled_time_ns"].item(row)),
        first_token_ns=int(tensors["first_token_time_ns"].item(row)),
        last_token_ns=int(tensors["last_token_time_ns"].item(row)),
    )


def collect(pieces: Iterable[Piece]) -> list[Completion]:
    """Joins the pieces of a finished request, in any interleaving, to one completion a sequence, in order.

    Raises:
        ServerError: a sequence has no last piece.
    """
    by_sequence: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_sequence.setdefault(piece.sequence_index, []).append(piece)
    return [_join(by_sequence[index]) for index in sorted(by_sequence)]


def _join(pieces: list[Piece]) -> Completion:
    last = pieces[-1]
    if last.finish_reason is None or last.usage is None:
        raise ServerError(f"expected a last piece of sequence {last.sequence_index}, got the end of the stream")
    return Completion(
        sequence_index=last.sequence_index,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        log_probs=tuple(value for piece in pieces for value in piece.log_probs),
        finish_reason=last.finish_reason,
        usage=last.usage,
    )
