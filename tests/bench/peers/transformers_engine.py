"""transformers' generate in float32: batches that start and end together, padded on the left."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from peers.protocol import Reply, Settings


class _Clock(StoppingCriteria):
    """Stops nothing: notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids, scores, **_):
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Transformers:
    precision = "float32"
    version = f"transformers {transformers.__version__}"

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self._model = AutoModelForCausalLM.from_pretrained(settings.checkpoint, dtype=torch.float32).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], streams: int, tokens: int) -> list[Reply]:
        replies = []
        for start in range(0, len(prompts), streams):
            replies += self._batch(prompts[start : start + streams], tokens)
        return replies

    def _batch(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Reply]:
        begin = time.perf_counter()
        longest = max(map(len, prompts))
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        clock = _Clock()
        output = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        times = clock.times
        return [Reply(row.tolist(), times[0] - begin, times[-1] - times[0]) for row in output[:, longest:]]


open_engine = Transformers
