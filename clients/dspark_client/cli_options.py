"""Options of the command line as dataclasses, and how commands take them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from dspark_client.call import DEFAULT_MODEL, DEFAULT_URL
from dspark_client.client import DSparkClient
from dspark_client.connection import ConnectionOptions, TlsOptions, parse_headers
from dspark_client.errors import InvalidRequestError
from dspark_client.options import GenerateOptions
from dspark_client.retry import RetryPolicy

_CONNECTION, _SAMPLING = "Connection", "Generation"


def _connection(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_CONNECTION, **settings)


def _sampling(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_SAMPLING, **settings)


@dataclass(frozen=True)
class ConnectOptions:
    """Options of every command: how to reach the server."""

    url: Annotated[
        str, _connection("--url", envvar="DSPARK_URL", show_default=True, help="host:port of Triton's gRPC service.")
    ] = DEFAULT_URL
    model: Annotated[str, _connection("--model", show_default=True, help="The model to call.")] = DEFAULT_MODEL
    tls: Annotated[bool, _connection("--tls/--insecure", help="Encrypt; --insecure (the default) does not.")] = False
    tls_ca: Annotated[Path | None, _connection(help="Root certificates (PEM) to trust; implies --tls.")] = None
    tls_cert: Annotated[Path | None, _connection(help="Client certificate (PEM); implies --tls.")] = None
    tls_key: Annotated[Path | None, _connection(help="Key of the client certificate (PEM).")] = None
    tls_server_name: Annotated[str | None, _connection(help="Name to expect in the server's certificate.")] = None
    header: Annotated[list[str], _connection(help="name=value to send with every call; may be repeated.")] = field(
        default_factory=list
    )
    compression: Annotated[str | None, _connection(help="gzip or deflate what is sent.")] = None
    timeout: Annotated[float | None, _connection(help="Seconds for the whole request.")] = None
    retries: Annotated[
        int, _connection(min=0, show_default=True, help="How often to try again before the first piece.")
    ] = 3

    def client(self) -> DSparkClient:
        """A client of these options.

        Raises:
            InvalidRequestError: an option cannot work.
        """
        wants_tls = self.tls or any((self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name))
        return DSparkClient(
            self.url,
            model_name=self.model,
            connection=ConnectionOptions(
                tls=TlsOptions(self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name) if wants_tls else None,
                compression=self.compression,  # type: ignore[arg-type]  # checked by ConnectionOptions
                headers=parse_headers(self.header),
            ),
            retry=RetryPolicy(max_attempts=self.retries + 1),
            timeout=self.timeout,
        )


@dataclass(frozen=True)
class SamplingOptions:
    """Options of the commands that generate. What is not given is left to the server."""

    max_tokens: Annotated[int | None, _sampling(help="Most tokens to generate.")] = None
    min_tokens: Annotated[int | None, _sampling(help="No end before this many tokens.")] = None
    temperature: Annotated[float | None, _sampling(help="0 is greedy.")] = None
    top_k: Annotated[int | None, _sampling(help="Keep the k most probable tokens.")] = None
    top_p: Annotated[float | None, _sampling(help="Keep the smallest set of this probability.")] = None
    min_p: Annotated[float | None, _sampling(help="Drop tokens below this share of the largest probability.")] = None
    repetition_penalty: Annotated[float | None, _sampling(help="Over prompt and output.")] = None
    presence_penalty: Annotated[float | None, _sampling(help="Over the output.")] = None
    frequency_penalty: Annotated[float | None, _sampling(help="Over the output, per occurrence.")] = None
    seed: Annotated[int | None, _sampling(help="Makes sampling reproducible.")] = None
    stop: Annotated[list[str], _sampling(help="End before this text; may be repeated.")] = field(default_factory=list)
    bad_word: Annotated[list[str], _sampling(help="Never generate this; may be repeated.")] = field(
        default_factory=list
    )
    ignore_eos: Annotated[bool, _sampling("--ignore-eos", help="Go on past the end-of-sequence token.")] = False
    log_probs: Annotated[bool, _sampling("--log-probs", help="Report log-probabilities (see --json).")] = False
    priority: Annotated[int | None, _sampling(help="Higher is admitted first.")] = None
    draft_policy: Annotated[
        str | None, _sampling(help="Verification depth: off, fixed:N, threshold:P, causal or lagged.")
    ] = None
    max_draft_tokens: Annotated[int | None, _sampling(help="Most drafts verified a round.")] = None

    def generate_options(self, *, sequences: int | None = None, echo: bool = False) -> GenerateOptions:
        return GenerateOptions(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop_words=self.stop or None,
            bad_words=self.bad_word or None,
            ignore_eos=self.ignore_eos or None,
            return_log_probs=self.log_probs or None,
            num_return_sequences=sequences,
            exclude_input_in_output=False if echo else None,
            priority=self.priority,
            draft_policy=self.draft_policy,
            max_draft_tokens=self.max_draft_tokens,
        )


def flatten(command: Callable[..., None]) -> Callable[..., None]:
    """Lets a command take whole dataclasses: each of their fields becomes an option of its own.

    A parameter annotated with ``ConnectOptions`` or ``SamplingOptions`` is replaced, in the signature that typer reads,
    by the dataclass's fields; a call collects them again.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if hint in (ConnectOptions, SamplingOptions)}
    own = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name not in groups
    ]

    @functools.wraps(command)
    def flat(**arguments: Any) -> None:
        collected = {
            name: group(**{f.name: arguments.pop(f.name) for f in fields(group)}) for name, group in groups.items()
        }
        command(**arguments, **collected)

    parameters = own + [parameter for group in groups.values() for parameter in _parameters(group)]
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _parameters(group: type[ConnectOptions | SamplingOptions]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=[] if f.default is MISSING else f.default,
            annotation=hints[f.name],
        )
        for f in fields(group)
    ]


def parse_ids(text: str) -> list[int]:
    """Token ids separated by blanks or commas.

    Raises:
        InvalidRequestError: something in it is not an integer.
    """
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise InvalidRequestError(f"--ids: expected token ids as integers, got {text!r}") from error
