"""OpenVINO GenAI's continuous batching, on the GGUF file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import openvino
import openvino_genai

from peers.protocol import Reply, Settings

CACHE_GB = 1


class OpenVino:
    precision = "Q4_1"
    version = f"openvino-genai {openvino_genai.__version__.split('-')[0]}"

    def __init__(self, settings: Settings) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = False
        limits = {"INFERENCE_NUM_THREADS": settings.threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(settings.gguf), scheduler, "CPU", limits)
        self._asked = 0

    def generate(self, prompts: Sequence[Sequence[int]], streams: int, tokens: int) -> list[Reply]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        waiting = deque(range(len(prompts)))
        running: dict[int, object] = {}
        begun, ids, times = {}, [[] for _ in prompts], [[] for _ in prompts]
        while waiting or running:
            while waiting and len(running) < streams:
                index = waiting.popleft()
                tensor = openvino.Tensor(np.asarray([prompts[index]], np.int64))
                begun[index] = time.perf_counter()
                running[index] = self._pipeline.add_request(self._asked, tensor, config)
                self._asked += 1
            self._pipeline.step()
            now = time.perf_counter()
            for index, handle in list(running.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        ids[index] += output.generated_ids
                        times[index].append(now)
                if len(ids[index]) >= tokens:
                    del running[index]
        return [Reply(ids[i], times[i][0] - begun[i], times[i][-1] - times[i][0]) for i in range(len(prompts))]


open_engine = OpenVino
