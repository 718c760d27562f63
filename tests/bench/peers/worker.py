"""One engine behind a pair of pipes: JSON lines in, JSON lines out.

    python -m peers.worker ENGINE SETTINGS_JSON

Says {"precision", "version"} when the engine is open; then answers each {"prompts", "streams", "tokens"} with
{"replies", "seconds"}. Ends with its input.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path

from peers.protocol import Engine, Settings

PATHS = ("gguf", "checkpoint", "genai")


def main() -> None:
    # Libraries write to standard output as they like: keep the pipe to ourselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    given = json.loads(sys.argv[2])
    settings = Settings(**{key: Path(value) if key in PATHS else value for key, value in given.items()})
    engine: Engine = importlib.import_module(f"peers.{sys.argv[1]}").open_engine(settings)

    def say(content: object) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    say({"precision": engine.precision, "version": engine.version})
    for line in sys.stdin:
        asked = json.loads(line)
        begin = time.perf_counter()
        replies = engine.generate(asked["prompts"], asked["streams"], asked["tokens"])
        seconds = time.perf_counter() - begin
        say({"replies": [dataclasses.asdict(reply) for reply in replies], "seconds": seconds})
    answers.close()
    os._exit(0)  # some of the engines hang or crash in their own cleanup


if __name__ == "__main__":
    main()
