"""The ``dspark`` command.

Exit codes: 0 done, 1 the server failed, 2 a wrong argument or request, 3 the server is unavailable, 4 it cannot be
reached, 5 the time ran out, 6 the request was cancelled by the server, 130 interrupted.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Annotated, Any

import typer

from dspark_client import cli_output as output
from dspark_client import prometheus
from dspark_client.call import PROBE_TIMEOUT_S
from dspark_client.cli_options import ConnectOptions, SamplingOptions, flatten, parse_ids
from dspark_client.client import DSparkClient
from dspark_client.errors import (
    DeadlineError,
    DSparkClientError,
    InvalidRequestError,
    RequestCancelledError,
    ServerConnectionError,
    ServerUnavailableError,
)
from dspark_client.options import GenerateOptions, Message

EXIT_INTERRUPTED = 130
EXIT_SERVER_ERROR = 1
EXIT_CODES: dict[type[DSparkClientError], int] = {
    InvalidRequestError: 2,
    ServerUnavailableError: 3,
    ServerConnectionError: 4,
    DeadlineError: 5,
    RequestCancelledError: 6,
}
METRICS_PREFIX = "dspark_"

Json = Annotated[bool, typer.Option("--json", help="Write JSON, one object a line.")]

app = typer.Typer(
    help="Talk to a Triton server with the dspark model.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
@flatten
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    connect: ConnectOptions,
    sampling: SamplingOptions,
    sequences: Annotated[int | None, typer.Option("--num-return-sequences", "-n", help="Answers to generate.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="PROMPT is token ids, separated by blanks or commas.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a user's turn: use the chat template.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Write the prompt before the answer.")] = False,
    stream: Annotated[bool, typer.Option(help="Write pieces as they come, or only the whole.")] = True,
    stats: Annotated[bool, typer.Option("--stats", help="Tell tokens and speed on stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Generate text. With --json an object for every piece, or with --no-stream for every whole answer."""
    if ids and chat:
        raise InvalidRequestError("expected --ids or --chat, got both")
    text = sys.stdin.read() if prompt == "-" else prompt
    arguments: dict[str, Any] = {"options": sampling.generate_options(sequences=sequences, echo=echo)}
    if ids:
        arguments["input_ids"] = parse_ids(text)
    elif chat:
        arguments["messages"] = [Message("user", text)]
    else:
        arguments["text_input"] = text
    with connect.client() as client:
        if stream and as_json:
            with closing(client.stream(**arguments)) as pieces:
                for piece in pieces:
                    output.write_json(piece)
                    if stats and piece.usage:
                        output.write_usage(piece.usage)
        elif stream and sequences in (None, 1):
            with closing(client.stream(**arguments)) as pieces:
                _, usage = output.write_text_pieces(pieces)
            if stats and usage:
                output.write_usage(usage)
        else:
            completions = client.generate(**arguments)
            if as_json:
                for completion in completions:
                    output.write_json(completion)
            else:
                output.write_completions(completions)
            if stats:
                for completion in completions:
                    output.write_usage(completion.usage)


@app.command()
@flatten
def chat(
    connect: ConnectOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, typer.Option(help="The system's turn before the first.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Tell tokens and speed on stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Chat, a line a turn. /reset forgets, /exit or end of input leaves, Ctrl-C stops an answer."""
    start = [Message("system", system)] if system else []
    history = list(start)
    interactive = sys.stdin.isatty()
    with connect.client() as client:
        while (line := _read_turn(interactive)) is not None:
            if line == "/exit":
                return
            if line == "/reset":
                history = list(start)
            elif line:
                try:
                    turn = [*history, Message("user", line)]
                    history = [*turn, _answer(client, turn, sampling.generate_options(), stats=stats, as_json=as_json)]
                except KeyboardInterrupt:
                    if not interactive:
                        raise
                    output.write("\n")
                except DSparkClientError as error:
                    if not interactive:
                        raise
                    output.write_error(str(error))


@app.command()
@flatten
def models(connect: ConnectOptions, as_json: Json = False) -> None:
    """List the server's models."""
    with connect.client() as client:
        found = client.models()
    if as_json:
        for model in found:
            output.write_json(model)
    else:
        output.write_models(found)


@app.command()
@flatten
def stats(
    connect: ConnectOptions,
    metrics_url: Annotated[
        str | None, typer.Option(help="Triton's metrics, http://host:8002/metrics: adds the engine's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the model's statistics and, with --metrics-url, the engine's metrics. --json writes one object."""
    with connect.client() as client:
        statistics = client.statistics()
    samples = prometheus.fetch(metrics_url, METRICS_PREFIX, connect.timeout or PROBE_TIMEOUT_S) if metrics_url else []
    if as_json:
        output.write_json({"statistics": statistics, "metrics": samples})
        return
    output.write_statistics(statistics)
    if metrics_url:
        output.write_metrics(samples)


def _read_turn(interactive: bool) -> str | None:
    if interactive:
        output.write("> ")
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(
    client: DSparkClient, turn: Sequence[Message], options: GenerateOptions, *, stats: bool, as_json: bool
) -> Message:
    with closing(client.stream(messages=turn, options=options)) as pieces:
        text, usage = output.write_json_pieces(pieces) if as_json else output.write_text_pieces(pieces)
    if stats and usage:
        output.write_usage(usage)
    return Message("assistant", text)


def run(arguments: Sequence[str]) -> int:
    """Runs a command line and returns its exit code; errors become one line on stderr."""
    try:
        result = app(list(arguments), prog_name="dspark", standalone_mode=False)
    except DSparkClientError as error:
        output.write_error(str(error))
        return EXIT_CODES.get(type(error), EXIT_SERVER_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except Exception as error:
        # The base class of usage errors has no public name in every typer release.
        if not hasattr(error, "format_message"):
            raise
        output.write_error(f"{error.format_message().rstrip('.')}; see --help")
        return EXIT_CODES[InvalidRequestError]
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of ``dspark``."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal's encoding lacks must not cost the rest of the answer.
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))
