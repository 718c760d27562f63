"""llama.cpp's own server (continuous batching), in the wheel xllamacpp, over HTTP as its users call it."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import xllamacpp

from peers.protocol import Reply, Settings

_UNSENT = -1
"""Stands for a token whose number is not known."""


class LlamaCpp:
    precision = "Q4_1"
    version = f"llama.cpp (xllamacpp {xllamacpp.__version__})"

    def __init__(self, settings: Settings) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(settings.gguf)
        params.n_parallel = settings.streams
        params.n_ctx = settings.streams * settings.context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.threads
        params.verbosity = -1
        self._server = xllamacpp.Server(params)

    def generate(self, prompts: Sequence[Sequence[int]], streams: int, tokens: int) -> list[Reply]:
        with ThreadPoolExecutor(streams) as pool:
            return list(pool.map(lambda prompt: self._one(prompt, tokens), prompts))

    def _one(self, prompt: Sequence[int], tokens: int) -> Reply:
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body |= {"return_tokens": True, "cache_prompt": False}
        url = f"{self._server.listening_address}/completion"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        ids: list[int] = []
        begin = first = last = time.perf_counter()
        with urllib.request.urlopen(request) as response:
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line[6:])
                if got := event["tokens"]:
                    last = time.perf_counter()
                    first = first if ids else last
                    ids += got
                elif event["stop"]:
                    # Where an answer ends within a character, its last tokens are generated but never sent.
                    ids += [_UNSENT] * (event["tokens_predicted"] - len(ids))
        return Reply(ids, first - begin, last - first)


open_engine = LlamaCpp
