"""``python -m dspark_load.genai_perf``: NVIDIA's genai-perf against the model as it is served, in a venv of its own."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from dspark_load.errors import LoadError
from dspark_load.tool import find

log = logging.getLogger("dspark_load")

PACKAGE = "genai-perf==0.0.16"


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those that genai-perf gets as they are."""
    parser = argparse.ArgumentParser(
        prog="deploy/load/run genai-perf",
        description="Run genai-perf against a served model; what is not listed here goes to `genai-perf profile`.",
    )
    parser.add_argument("--url", required=True, help="host:port of gRPC")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with a tokenizer.json")
    parser.add_argument("--model", default="dspark")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48, help="of every answer")
    parser.add_argument("--out", type=Path, default=Path("genai-perf-results"))
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/dspark"))
    return parser.parse_known_args(arguments)


def command(given: argparse.Namespace, tokenizer: Path, rest: list[str]) -> list[str]:
    """The call. Only names that the model has anyway: text_input, max_tokens, stream and ignore_eos."""
    call = ["genai-perf", "profile", "-m", given.model, "--endpoint-type", "kserve", "--backend", "tensorrtllm"]
    call += ["--streaming", "-u", given.url, "--concurrency", str(given.concurrency)]
    call += ["--request-count", str(given.requests), "--num-dataset-entries", str(given.requests)]
    call += ["--synthetic-input-tokens-mean", str(given.prompt_tokens), "--synthetic-input-tokens-stddev", "0"]
    call += ["--output-tokens-mean", str(given.tokens), "--extra-inputs", "ignore_eos:true"]
    call += ["--tokenizer", str(tokenizer), "--artifact-dir", str(given.out)]
    return [*call, *rest]


def tokenizer_folder(source: Path, folder: Path) -> Path:
    """A folder that transformers reads: the tokenizer.json of an artifact or checkpoint, and the class that loads it.

    Raises:
        LoadError: there is no tokenizer.json.
    """
    if not (source / "tokenizer.json").is_file():
        raise LoadError(f"--tokenizer {source}: expected a folder with tokenizer.json, such as a verifier's artifact")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source / "tokenizer.json", folder / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def environment(cache: Path) -> Path:
    """The bin folder of a venv with genai-perf, made at most once.

    Raises:
        LoadError: it cannot be installed.
    """
    home = cache / f"genai-perf-{PACKAGE.partition('==')[2]}"
    if not (home / "complete").is_file():
        log.info("installing %s", PACKAGE)
        venv.create(home, with_pip=True, clear=True)
        install = [str(home / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", PACKAGE]
        ended = subprocess.run(install, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            raise LoadError(f"{PACKAGE} cannot be installed: {ended.stderr.strip()[-500:]}")
        (home / "complete").touch()
    return home / "bin"


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="  %(message)s", stream=sys.stderr)
    given, rest = parse()
    cache = given.cache.expanduser().resolve()
    try:
        tool, programs = find(None, cache), environment(cache)
        tokenizer = tokenizer_folder(given.tokenizer, given.out / "tokenizer")
    except LoadError as error:
        log.error("error: %s", error)
        return 1
    # The package perf_analyzer, which genai-perf installs, is an empty placeholder: ours goes first.
    path = os.pathsep.join([str(tool.binary.parent), str(programs), os.environ.get("PATH", "")])
    variables = tool.variables | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command(given, tokenizer, rest), env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
