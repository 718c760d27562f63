"""From a bare machine to a streamed answer: environment, export, server, client. Standard library only."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path

import environment
import repository
from console import QuickstartError, say
from locks import exclusive, share, sole

import server

SERVED = "SmolLM2-135M-Instruct in int8, with its DSpark drafter (policy causal)"
EXTRAS = ("backend", "serve", "export")
PROMPT = "Explain in two sentences why the sky is blue."
FIRST_START = (
    "the first start downloads about 220 MB, fills about 0.9 GB of disk and takes two minutes on a fast network"
)
SERVING_SECS = 300.0
EXIT_INTERRUPTED = 130


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deploy/quickstart/run",
        description="Serve SmolLM2-135M with Triton on this machine's CPU and stream an answer. Stays up until Ctrl-C.",
        epilog=f"Everything goes to $DSPARK_CACHE (default ~/.cache/dspark); {FIRST_START}, later ones take seconds.",
    )
    parser.add_argument("--once", metavar="PROMPT", help="answer PROMPT on standard output, stop the server and exit")
    parser.add_argument("--port-base", type=int, default=8000, metavar="N", help="http N (8000), grpc N+1, metrics N+2")
    parser.add_argument("--detach", action="store_true", help="leave the server running in the background")
    parser.add_argument("--stop", action="store_true", help="stop the server that runs at --port-base")
    options = parser.parse_args(arguments)
    if not 1 <= options.port_base <= 65533:
        parser.error(f"--port-base: expected 1 to 65533, got {options.port_base}")
    if sum((options.once is not None, options.detach, options.stop)) > 1:
        parser.error("expected one of --once, --detach and --stop")
    return options


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("DSPARK_CACHE") or f"{base}/dspark").expanduser().resolve()


def make_folder(run: Path) -> None:
    """Raises:
    QuickstartError: the cache is not a folder, or not one that can be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QuickstartError(
            f"{run} cannot be made ({os.strerror(error.errno or 0)}): name a folder that you can write in DSPARK_CACHE"
        ) from error


def check_ports(base: int, run: Path) -> None:
    """Raises:
    QuickstartError: names the port that is taken, before anything is prepared.
    """
    if (running := server.recorded(run)) is not None:
        raise QuickstartError(
            f"a quickstart server (process {running.pid}) already runs at port {base}: stop it with --stop, or choose "
            "other ports with --port-base"
        )
    for port in range(base, base + 3):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError as error:
            raise QuickstartError(
                f"port {port} cannot be used ({os.strerror(error.errno or 0)}): stop the program that listens there, "
                "or choose other ports with --port-base"
            ) from error


def prepare_models(venv: environment.Environment, cache: Path, target: Path) -> Path:
    """The repository of the fastest that this machine can serve: int8, and the drafter that the project ships."""
    command, log = [str(venv.script("dspark-export"))], cache / "export.log"
    verifier = repository.export(command, repository.served_verifier(), venv.key, cache, log)
    drafter = repository.export(command, repository.served_drafter(verifier), venv.key, cache, log)
    return repository.assemble(target, verifier, drafter)


def start(options: argparse.Namespace, cache: Path, run: Path) -> int:
    begin = time.monotonic()
    check_ports(options.port_base, run)
    key = environment.fingerprint(EXTRAS)
    venv = environment.Environment(cache / f"venv-{key}", key)
    say(f"dspark quickstart (cache: {cache})")
    if not venv.complete:
        say(f"  {FIRST_START}")
    with exclusive(cache / "prepare.lock"):
        environment.prepare(venv, EXTRAS, cache / "install.log")
        used = share(venv.folder.with_suffix(".lock"))
        environment.prune(cache, venv)
        models = prepare_models(venv, cache, run / "repository")
    serving = server.Server(venv, run, options.port_base)
    detached = False
    try:
        serving.start(models, used, options.detach)
        serving.wait_until_serving(SERVING_SECS)
        say(f"  model: {SERVED}")
        say(f"  serving after {time.monotonic() - begin:.1f} s: grpc {serving.grpc_url}, log {serving.log}")
        if options.detach:
            detached = True
            say(f"  stop it with: {Path(sys.argv[0]).parent / 'run'} --stop --port-base {options.port_base}")
            return 0
        prompt = PROMPT if options.once is None else options.once
        if options.once is None:
            say(f"\n> {prompt}")
        if (code := serving.answer(prompt)) != 0:
            raise QuickstartError(f"the client ended with exit code {code}; server log: {serving.log}")
        if options.once is None:
            stay(serving)
        return 0
    finally:
        if not detached and not serving.stop():
            say(f"  the server did not stop cleanly; log: {serving.log}")


def stay(serving: server.Server) -> None:
    """Wait for Ctrl-C.

    Raises:
        QuickstartError: the server ended by itself.
    """
    dspark = serving.environment.script("dspark")
    say(f"\nThe server stays up until Ctrl-C. Ask it from another terminal:\n  {dspark} chat --url {serving.grpc_url}")
    try:
        code = serving.wait()
    except KeyboardInterrupt:
        return
    raise QuickstartError(f"the server ended by itself (exit code {code})\n{serving.why()}")


def main() -> int:
    options = parse()
    cache = cache_folder()
    run = cache / "run" / str(options.port_base)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.stop:
            running = server.recorded(run)
            if running is None:
                say(f"no quickstart server runs at port {options.port_base}")
                return 0
            server.stop_recorded(running, run)
            return 0
        make_folder(run)
        with sole(run / "lock", f"another quickstart is starting or running at port {options.port_base}"):
            return start(options, cache, run)
    except (QuickstartError, OSError) as error:
        say(f"error: {error}")
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    return 1


if __name__ == "__main__":
    sys.exit(main())
