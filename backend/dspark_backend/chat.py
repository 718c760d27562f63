"""Chat messages to a prompt, with the model's own Jinja template."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dspark_backend.errors import ArtifactError, InvalidRequest

_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads at once.

    The template is part of the model; messages are only data to it and cannot add template code.
    """

    def __init__(self, source: str | None, bos_token: str | None = None, eos_token: str | None = None) -> None:
        """Compile ``source``; None makes a model that takes no messages.

        Raises:
            ArtifactError: the template has a syntax error.
        """
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self._template = None
        if source is not None:
            try:
                self._template = _environment().from_string(source)
            except jinja2.TemplateError as error:
                raise ArtifactError(f"the model's chat template does not compile: {error}") from error

    def render(self, messages_json: str, add_generation_prompt: bool = True) -> str:
        """The prompt for a JSON list of messages. Encode it without adding special tokens.

        Raises:
            InvalidRequest: the model has no template, the JSON is no list of valid messages, or the template refuses
                them.
        """
        if self._template is None:
            raise InvalidRequest("messages: this model has no chat template; send the prompt as text_input instead")
        messages = parse_messages(messages_json)
        try:
            prompt = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except Exception as error:  # templates fail in any way that Python can
            raise InvalidRequest(f"messages: the model's chat template refused them: {error}") from error
        return prompt


def parse_messages(messages_json: str) -> list[dict[str, Any]]:
    """Check a JSON list of chat messages and bring it into the form that templates expect.

    Content given as text parts is joined with newlines (as in vLLM), tool call arguments given as JSON text become
    objects, and keys whose value is null are dropped.

    Raises:
        InvalidRequest: the message names the entry and the key at fault.
    """
    try:
        messages = json.loads(messages_json)
        messages_json.encode()
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("messages: expected Unicode text, got an unpaired surrogate") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"messages: expected a JSON list of messages, got malformed JSON ({error})") from error
    if not isinstance(messages, list):
        raise InvalidRequest(f"messages: expected a JSON list of messages, got {_kind(messages)}")
    if not messages:
        raise InvalidRequest("messages: expected at least one message, got an empty list")
    return [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _message(where: str, message: object) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where}: expected an object with role and content, got {_kind(message)}")
    unknown = [key for key in message if key not in _MESSAGE_KEYS]
    if unknown:
        raise InvalidRequest(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(_MESSAGE_KEYS)}")
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("role", "") == "":
        raise InvalidRequest(f"{where}: expected a role such as 'user', got none")
    for key in ("role", "name", "tool_call_id", "reasoning_content"):
        if key in message and not isinstance(message[key], str):
            raise InvalidRequest(f"{where}.{key}: expected a string, got {_kind(message[key])}")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(f"{where}.tool_calls", message["tool_calls"])
    if "content" in message:
        message["content"] = _content(f"{where}.content", message["content"])
    elif not message.get("tool_calls"):
        raise InvalidRequest(f"{where}: expected content, got none")
    return message


def _content(where: str, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where}: expected a string or a list of text parts, got {_kind(content)}")
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
            raise InvalidRequest(f'{where}[{index}]: expected {{"type": "text", "text": "..."}}, got {_brief(part)}')
        if not isinstance(part["text"], str):
            raise InvalidRequest(f"{where}[{index}].text: expected a string, got {_kind(part['text'])}")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(where: str, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequest(f"{where}: expected a list of objects, got {_kind(calls)}")
    for index, call in enumerate(calls):
        if not isinstance(call, dict):
            raise InvalidRequest(f"{where}[{index}]: expected an object, got {_kind(call)}")
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(f"{where}[{index}]: expected arguments as JSON, got {error}") from error
    return calls


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:80] + "..."


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's text for training; here it only passes it on."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that Hugging Face templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    filters: dict[str, Callable[..., Any]] = environment.filters
    filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which would change prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
