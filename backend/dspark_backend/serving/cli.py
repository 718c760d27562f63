"""``dspark-serve``: start Triton on a model repository, and probe a running one."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from dspark_backend.errors import ConfigError, DSparkError
from dspark_backend.serving import health as health_check
from dspark_backend.serving import orphans, server_log
from dspark_backend.serving.distribution import find_distribution
from dspark_backend.serving.launcher import Ending, Exit, TritonServer
from dspark_backend.serving.options import PortInUse, Ports, ServeOptions

MOST_SECS = 86400.0
"""Longest time that a check may be told to wait."""

EXIT_USAGE = 2
EXIT_PORT = 3
EXIT_KILLED = 4

HELP = """Serve a model repository with Triton Inference Server.

Triton is the container's (/opt/tritonserver), the one on PATH, or the nvidia-pytriton wheel's. Arguments after -- go to
tritonserver as they are. SIGTERM and SIGINT stop it cleanly; a second one at once.

Exit codes: 0 stopped on request; 2 wrong settings; 3 a port is in use; 4 killed after the exit timeout; 128+N ended by
signal N; else tritonserver's own.
"""

console = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback(invoke_without_command=True, help=HELP)
def serve(
    context: typer.Context,
    model_repository: Annotated[Path | None, typer.Option(help="folder with the models")] = None,
    port_base: Annotated[int | None, typer.Option(help="http at this port, grpc and metrics at the next two")] = None,
    http_port: Annotated[int | None, typer.Option(help="default 8000")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="default 8001")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="default 8002")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "0.0.0.0",
    model: Annotated[list[str] | None, typer.Option(help="load only this model; may be repeated")] = None,
    log_file: Annotated[Path | None, typer.Option(help="append Triton's output to this file")] = None,
    exit_timeout_secs: Annotated[int, typer.Option(help="a stop waits this long for requests in flight")] = 10,
    strict_readiness: Annotated[bool, typer.Option(help="ready only when every model is")] = True,
    tritonserver: Annotated[Path | None, typer.Option(help="the binary to start")] = None,
    clean_orphans: Annotated[bool, typer.Option(help="remove what a killed earlier server left behind")] = True,
) -> None:
    if context.invoked_subcommand is not None:
        return
    if model_repository is None:
        raise ConfigError("--model-repository: expected a folder with Triton models, got nothing")
    base = Ports() if port_base is None else Ports.from_base(port_base)
    options = ServeOptions(
        model_repository=model_repository,
        ports=Ports(
            base.http if http_port is None else http_port,
            base.grpc if grpc_port is None else grpc_port,
            base.metrics if metrics_port is None else metrics_port,
        ),
        host=host,
        models=tuple(model or ()),
        log_file=log_file,
        exit_timeout_secs=exit_timeout_secs,
        strict_readiness=strict_readiness,
        extra=tuple(context.obj or ()),
    )
    server = TritonServer(options, find_distribution(tritonserver))
    raise typer.Exit(exit_code(supervise(server, clean_orphans)))


@app.command()
def health(
    url: Annotated[str, typer.Option(help="host:port of the gRPC service")] = "127.0.0.1:8001",
    model: Annotated[str, typer.Option(help="the model to ask for one token")] = health_check.DEFAULT_MODEL,
    ready_only: Annotated[bool, typer.Option("--ready-only", help="make no inference")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="one that is full, or too busy to answer in time, counts as healthy")
    ] = False,
    metrics_url: Annotated[
        str | None,
        typer.Option(
            help="with --live: counters that tell a busy model from a dead one; default: the port after --url's"
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="seconds for one check", min=0.001, max=MOST_SECS)] = 10.0,
    wait: Annotated[
        float, typer.Option(help="seconds to go on checking until it is healthy", min=0.0, max=MOST_SECS)
    ] = 0.0,
) -> None:
    """Exit 0 if the server can infer, 1 with a reason if not. Made for Kubernetes probes."""
    counters = (metrics_url or health_check.beside(url)) if live else None
    state = health_check.wait(url, None if ready_only else model, timeout, wait, counters, live)
    good = state.alive if live else state.healthy
    said = "healthy" if state.healthy else "busy" if good else "unhealthy"
    typer.echo(f"{said}: {state.reason} ({state.seconds:.2f} s)")
    raise typer.Exit(0 if good else 1)


@app.command()
def clean() -> None:
    """Remove stubs and shared memory that a killed server left behind; live servers are not touched."""
    removed = orphans.clean()
    typer.echo(f"ended {len(removed.stubs)} orphan stubs, removed {len(removed.regions)} stale regions")


def supervise(server: TritonServer, clean_orphans: bool = True) -> Exit:
    """Run the server in the foreground until it ends or SIGTERM or SIGINT comes; a second signal kills it."""
    asked = threading.Event()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            server.kill()
        asked.set()
        console.print(f"got {signal.Signals(number).name}: stopping")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    options = server.options
    console.print(
        f"starting Triton ({server.distribution.origin}: {server.distribution.binary}) on {options.model_repository}"
    )
    for name in options.left_out:
        console.print(f"leaving out {name}: nothing is exported to {options.model_repository / name}")
    start = time.monotonic()
    server.start(clean_orphans)
    ready = False
    while (ended := server.wait(0.5)) is None and not asked.is_set():
        if not ready and (ready := health_check.check(server.grpc_url, None, timeout=2.0).healthy):
            console.print(
                f"ready after {time.monotonic() - start:.1f} s: grpc {server.grpc_url}, http {server.http_url}, "
                f"metrics {server.metrics_url}"
            )
    if ended is None or asked.is_set():
        ended = server.stop()
    else:
        server.stop()
    console.print(str(ended))
    if not ended.clean and (lines := server_log.tail(options.log_file, start=server.log_start)):
        console.print(f"what {options.log_file} says:\n{lines}", markup=False)
    return ended


def exit_code(ended: Exit) -> int:
    """The command's exit code for a server's end."""
    if ended.clean:
        return 0
    if ended.ending is Ending.KILLED:
        return EXIT_KILLED
    return 128 - ended.code if ended.code < 0 else ended.code


def main(arguments: list[str] | None = None) -> None:
    """Console script. What follows ``--`` is tritonserver's."""
    given = sys.argv[1:] if arguments is None else arguments
    cut = given.index("--") if "--" in given else len(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console)])
    try:
        app(args=given[:cut], obj=given[cut + 1 :], prog_name="dspark-serve")
    except PortInUse as error:
        _fail(error, EXIT_PORT)
    except ConfigError as error:
        _fail(error, EXIT_USAGE)
    except DSparkError as error:
        _fail(error, 1)


def _fail(error: DSparkError, code: int) -> None:
    console.print(f"dspark-serve: {error}", style="red", markup=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
