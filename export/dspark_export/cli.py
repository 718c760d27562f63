"""``dspark-export``: checkpoints to servable artifacts."""

from __future__ import annotations

import logging
import signal
from typing import Annotated

import typer
from rich.markup import escape

from dspark_backend.errors import DSparkError
from dspark_export.commands.corpus import corpus
from dspark_export.commands.drafter import drafter
from dspark_export.commands.engine import engine
from dspark_export.commands.plan import plan
from dspark_export.commands.profile import profile
from dspark_export.commands.progress import console
from dspark_export.commands.speculation import calibrate, evaluate
from dspark_export.commands.train import train
from dspark_export.commands.verifier import verifier

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def root(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done.")] = False) -> None:
    """Export checkpoints to artifacts that the dspark models of a Triton model repository serve."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


for command in (verifier, drafter, engine, plan, corpus, train, profile, calibrate, evaluate):
    app.command()(command)


def main() -> None:
    """Entry point: an expected failure is one line and exit code 1. SIGTERM ends a command as Ctrl-C does, so that no
    half-written folder stays behind."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except (DSparkError, OSError) as error:
        console.print(f"[bold red]error[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
