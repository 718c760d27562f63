"""ONNX Runtime GenAI: batches that start and end together, padded on the right (its attention masks nothing else)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import onnxruntime_genai

from peers.protocol import Reply, Settings

PAD = 0


class OnnxRuntimeGenAI:
    precision = "int4 (requantised)"
    version = f"onnxruntime-genai {onnxruntime_genai.__version__}"

    def __init__(self, settings: Settings) -> None:
        config = onnxruntime_genai.Config(str(settings.genai))
        threads = f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {settings.threads}}}}}}}}}'
        config.overlay(threads)
        self._model = onnxruntime_genai.Model(config)
        self._tokenizer = onnxruntime_genai.Tokenizer(self._model)

    def generate(self, prompts: Sequence[Sequence[int]], streams: int, tokens: int) -> list[Reply]:
        replies = []
        for start in range(0, len(prompts), streams):
            replies += self._batch(prompts[start : start + streams], tokens)
        return replies

    def _batch(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Reply]:
        begin = time.perf_counter()
        longest = max(map(len, prompts))
        padded = np.full((len(prompts), longest), PAD, np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(batch_size=len(prompts), max_length=longest + tokens, do_sample=False)
        generator = onnxruntime_genai.Generator(self._model, params)
        generator.append_tokens(padded)
        streams = [self._tokenizer.create_stream() for _ in prompts]
        ids: list[list[int]] = [[] for _ in prompts]
        times = []
        for _ in range(tokens):
            generator.generate_next_token()
            for answer, stream, token in zip(ids, streams, generator.get_next_tokens(), strict=True):
                answer.append(int(token))
                stream.decode(int(token))  # what a user who streams would print
            times.append(time.perf_counter())
        return [Reply(answer, times[0] - begin, times[-1] - times[0]) for answer in ids]


open_engine = OnnxRuntimeGenAI
