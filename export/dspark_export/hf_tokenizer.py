"""tokenizer.json and its settings from a Hugging Face folder."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from dspark_export.errors import ExportError
from dspark_export.families.common import text_config
from dspark_export.tokenizer_info import TokenizerInfo

logger = logging.getLogger(__name__)


def copy_tokenizer(model_dir: Path, out_dir: Path) -> TokenizerInfo | None:
    """Copy ``model_dir/tokenizer.json`` to the existing directory ``out_dir``, and read what goes with it.

    Tokens that only tokenizer_config.json lists are added to the copy. Returns None where the folder has no
    tokenizer.json: the model can then be used with token ids only.

    Raises:
        ExportError: a file is corrupt, or two of them disagree on a token's id.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        logger.warning("%s: no tokenizer.json; the exported model takes input_ids only", model_dir)
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:  # the library's panics are no subclass of Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ExportError(
            f"{path}: expected a tokenizer of the tokenizers library ({error}); download it again"
        ) from error

    settings = _read_json(model_dir / "tokenizer_config.json")
    named = _read_json(model_dir / "special_tokens_map.json") | settings
    model = _read_json(model_dir / "config.json")
    ends = set(stated_ends(model_dir, model))
    if _add_missing(tokenizer, settings, path):
        tokenizer.save(str(out_dir / path.name), pretty=False)
    else:
        shutil.copyfile(path, out_dir / path.name)

    bos_token, eos_token = _content(named.get("bos_token")), _content(named.get("eos_token"))
    text_model = text_config(model)
    bos_id = _token_id(tokenizer, bos_token)
    if bos_id is None:
        bos_id = next(iter(_ids(model.get("bos_token_id"), text_model.get("bos_token_id"))), None)
        bos_token = None if bos_id is None else tokenizer.id_to_token(bos_id)
    end = _token_id(tokenizer, eos_token)
    if eos_token is not None and end is None:
        logger.warning(
            "%s: eos_token %r is no token of tokenizer.json; answers end at %s", model_dir, eos_token, sorted(ends)
        )
    ends.update(_ids(end))
    if eos_token is None and ends:
        eos_token = tokenizer.id_to_token(min(ends))
    add_bos = settings.get("add_bos_token")
    return TokenizerInfo(
        bos_token_id=bos_id,
        eos_token_ids=tuple(sorted(ends)),
        add_bos=None if add_bos is None or (add_bos and bos_id is None) else bool(add_bos),
        chat_template=_chat_template(model_dir, settings),
        bos_token=bos_token,
        eos_token=eos_token,
    )


def stated_ends(model_dir: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Every token that ends an answer by config.json and generation_config.json, in ascending order.

    Raises:
        ExportError: generation_config.json is corrupt.
    """
    generation = _read_json(model_dir / "generation_config.json")
    said = (found.get("eos_token_id") for found in (generation, config, text_config(config)))
    return tuple(sorted(set(_ids(*said))))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path}: expected JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ExportError(f"{path}: expected a JSON object, got {type(content).__name__}; download it again")
    return content


def _content(token: object) -> str | None:
    """Text of a special token, written as a string or as an object with its properties."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _token_id(tokenizer: Tokenizer, token: str | None) -> int | None:
    found: int | None = None if token is None else tokenizer.token_to_id(token)
    return found


def _ids(*values: object) -> list[int]:
    """Flat list of ids given as a number, a list of them or null."""
    flat = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
    return [entry for entry in flat if isinstance(entry, int)]


def _add_missing(tokenizer: Tokenizer, settings: dict[str, Any], path: Path) -> bool:
    """Add tokens that only tokenizer_config.json knows, as transformers does; whether there were any."""
    listed = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or not all(
        index.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
        for index, token in listed.items()
    ):
        raise ExportError(
            f"{path.parent / 'tokenizer_config.json'}: added_tokens_decoder: expected token ids with the content of "
            "each; download it again"
        )
    missing = [
        (int(index), token) for index, token in listed.items() if tokenizer.token_to_id(token["content"]) is None
    ]
    for index, token in sorted(missing, key=lambda entry: entry[0]):
        flags = {name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "special")}
        normalized = bool(token.get("normalized", not flags["special"]))
        tokenizer.add_tokens([AddedToken(token["content"], normalized=normalized, **flags)])
        got = tokenizer.token_to_id(token["content"])
        if got != index:
            raise ExportError(
                f"{path}: tokenizer_config.json gives {token['content']!r} the id {index}, but the next free one is "
                f"{got}; the two files do not belong together, download both again"
            )
    return bool(missing)


def _chat_template(model_dir: Path, settings: dict[str, Any]) -> str | None:
    """The template, from the first that exists of chat_template.jinja, chat_template.json and tokenizer_config.json."""
    jinja = model_dir / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ExportError(f"{jinja}: expected UTF-8 text ({error}); download it again") from error
    found = _read_json(model_dir / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(found, list):
        by_name = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = by_name.get("default")
        if found is None:
            logger.warning("%s: no chat template named default among %s; none is used", model_dir, list(by_name))
    return found if isinstance(found, str) else None
