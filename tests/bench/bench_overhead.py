"""What everything around the model costs: time between tokens for a gRPC client, against the bare stage.

One stream on an otherwise idle server, and the same number of steps of the same artifact in this process, turn and turn
about: same threads, same context lengths, same tokens, and whichever is not measured is idle. The bare step is
OnnxRuntimeVerifier.step: no sampling, no engine, no Triton, no network.

Run: PYTHONPATH=tests/support python tests/bench/bench_overhead.py --artifact DIR
(DIR: dspark-export verifier --model smollm2-135m --out DIR)
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from raw_calls import RawClient
from tritonclient.grpc import model_config_pb2

from dspark_backend.kv_cache import capacity_for
from dspark_backend.serving.distribution import find_distribution
from dspark_backend.serving.launcher import TritonServer
from dspark_backend.serving.options import Ports, ServeOptions
from dspark_backend.stages.batch import Segment, StepBatch
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

CHECKOUT = Path(__file__).resolve().parents[2]
SETTLE_SECS = 0.3
"""Between turns: ONNX Runtime's threads spin for a while after a step, and would take a core from the other side."""


@dataclass(frozen=True)
class Turn:
    """Milliseconds between the tokens of one stream, and between the same steps of the bare stage."""

    client: list[float]
    bare: list[float]


def make_repository(artifact: Path, folder: Path, threads: int) -> Path:
    """A repository with the dspark model alone, on this artifact."""
    shutil.copytree(CHECKOUT / "model_repository" / "dspark", folder / "dspark")
    path = folder / "dspark" / "config.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    config.parameters["verifier"].string_value = str(artifact.resolve())
    config.parameters["threads"].string_value = str(threads)
    config.parameters["policy"].string_value = "off"
    path.write_text(text_format.MessageToString(config))
    return folder


def client_turn(client: RawClient, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """Tokens, and milliseconds a token between responses as the client sees them."""
    ids: list[int] = []
    times, counts = [], []
    asked = {"input_ids": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    for piece in client.stream(asked):
        times.append(time.perf_counter())
        counts.append(len(piece["output_ids"]))
        ids += piece["output_ids"]
    assert len(ids) == tokens
    # More than one token a response means that the server could not send in time: rare, and a response is not a token.
    return ids, (np.diff(times) * 1e3 / counts[1:]).tolist()


def bare_turn(stage: OnnxRuntimeVerifier, prompt: list[int], ids: list[int]) -> list[float]:
    """Milliseconds of the steps that made ids[1:]: each runs the token before it."""
    stage.step(StepBatch.pack([Segment(0, 0, prompt, len(prompt) - 1)]))
    times = []
    for index, token in enumerate(ids[:-1]):
        begin = time.perf_counter()
        output = stage.step(StepBatch.pack([Segment(0, len(prompt) + index, [token], 0)]))
        said = int(output.argmax[0])
        times.append((time.perf_counter() - begin) * 1e3)
        assert said == ids[index + 1], "the bare stage disagrees with the server"
    return times


def measure(artifact: Path, threads: int, context: int, tokens: int, turns: int) -> list[Turn]:
    """Turns of both sides, after one that warms them up."""
    stage = OnnxRuntimeVerifier(artifact, threads)
    stage.allocate(1, capacity_for(context + tokens), ())
    rng = np.random.default_rng(0)
    done: list[Turn] = []
    with tempfile.TemporaryDirectory() as folder:
        repository = make_repository(artifact, Path(folder) / "repository", threads)
        options = ServeOptions(repository, Ports.free(), "127.0.0.1", log_file=Path(folder) / "triton.log")
        with TritonServer(options, find_distribution()) as server:
            server.wait_until_serving("dspark", 120.0)
            with RawClient(server.grpc_url) as client:
                for _ in range(turns + 1):
                    prompt = rng.integers(0, stage.artifact.vocab_size, context).tolist()
                    time.sleep(SETTLE_SECS)
                    ids, between = client_turn(client, prompt, tokens)
                    time.sleep(SETTLE_SECS)
                    done.append(Turn(between, bare_turn(stage, prompt, ids)))
    stage.close()
    return done[1:]


def report(turns: list[Turn]) -> None:
    client = [value for turn in turns for value in turn.client]
    bare = [value for turn in turns for value in turn.bare]
    print(f"{'ms a token':>16} {'median':>8} {'p10':>8} {'p90':>8}")
    for name, values in (("gRPC client", client), ("bare stage", bare)):
        low, high = np.percentile(values, [10, 90])
        print(f"{name:>16} {statistics.median(values):8.3f} {low:8.3f} {high:8.3f}")
    ratios = [statistics.median(turn.client) / statistics.median(turn.bare) for turn in turns]
    print(f"ratio of the medians {statistics.median(client) / statistics.median(bare):.3f} (aim: below 1.05)")
    print(f"ratio turn by turn   {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--artifact", type=Path, required=True, help="an exported verifier")
    parser.add_argument("--threads", type=int, default=0, help="of the runtime, on both sides; 0 is one a core")
    parser.add_argument("--context", type=int, default=140, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens of a turn")
    parser.add_argument("--turns", type=int, default=9)
    given = parser.parse_args()
    print(f"{given.artifact.name}: context {given.context}, {given.turns} turns of {given.tokens} tokens")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores before the start: above 0.3, trust nothing")
    report(measure(given.artifact, given.threads, given.context, given.tokens, given.turns))


if __name__ == "__main__":
    main()
