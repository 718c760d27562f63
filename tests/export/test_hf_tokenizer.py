"""Tokenizer files of a Hugging Face folder, in the layouts that are out there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from dspark_export.errors import ExportError
from dspark_export.hf_tokenizer import copy_tokenizer, stated_ends
from dspark_export.tokenizer_info import TokenizerInfo


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    inner = Tokenizer(BPE(vocab={"a": 0, "b": 1, "<s>": 2, "</s>": 3, "<end>": 4}, merges=[]))
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>", "<end>")])
    inner.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def write(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_no_tokenizer(tmp_path: Path, out: Path) -> None:
    assert copy_tokenizer(tmp_path, out) is None
    assert list(out.iterdir()) == []


def test_bare_tokenizer(model: Path, out: Path) -> None:
    assert copy_tokenizer(model, out) == TokenizerInfo(None, (), None, None, None, None)
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_everything_in_tokenizer_config(model: Path, out: Path) -> None:
    write(
        model,
        tokenizer_config={
            "bos_token": {"content": "<s>", "lstrip": False},
            "eos_token": "</s>",
            "add_bos_token": True,
            "chat_template": "T",
        },
    )
    assert copy_tokenizer(model, out) == TokenizerInfo(2, (3,), True, "T", "<s>", "</s>")


def test_special_tokens_map(model: Path, out: Path) -> None:
    write(model, special_tokens_map={"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    assert copy_tokenizer(model, out) == TokenizerInfo(2, (3,), None, None, "<s>", "</s>")


def test_eos_is_the_union(model: Path, out: Path) -> None:
    write(
        model,
        tokenizer_config={"eos_token": "<end>"},
        generation_config={"eos_token_id": [3, 1]},
        config={"eos_token_id": 3, "bos_token_id": 2},
    )
    info = copy_tokenizer(model, out)
    assert info == TokenizerInfo(2, (1, 3, 4), None, None, "<s>", "<end>")


def test_an_eos_token_that_is_none_is_said(model: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(model, tokenizer_config={"eos_token": "<stop>"}, config={"eos_token_id": 3})
    info = copy_tokenizer(model, out)
    assert info is not None and info.eos_token_ids == (3,)
    assert "eos_token '<stop>' is no token of tokenizer.json; answers end at [3]" in caplog.text


def test_ids_of_the_model_config_alone(model: Path, out: Path) -> None:
    write(model, config={"text_config": {"bos_token_id": 2, "eos_token_id": [3]}})
    assert copy_tokenizer(model, out) == TokenizerInfo(2, (3,), None, None, "<s>", "</s>")


def test_null_values(model: Path, out: Path) -> None:
    settings = {"bos_token": None, "eos_token": None, "add_bos_token": None, "chat_template": None}
    write(model, tokenizer_config=settings, config={"eos_token_id": None}, generation_config={"eos_token_id": None})
    assert copy_tokenizer(model, out) == TokenizerInfo(None, (), None, None, None, None)


def test_chat_template_files(model: Path, out: Path) -> None:
    def template() -> str | None:
        info = copy_tokenizer(model, out)
        assert info is not None
        return info.chat_template

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "from the list"}]
    write(model, tokenizer_config={"chat_template": named[:1]})
    assert template() is None
    write(model, tokenizer_config={"chat_template": named})
    assert template() == "from the list"
    write(model, chat_template={"chat_template": "from json"})
    assert template() == "from json"
    (model / "chat_template.jinja").write_text("from jinja é", encoding="utf-8")
    assert template() == "from jinja é"


def test_tokens_that_only_the_config_lists_are_added(model: Path, out: Path) -> None:
    added = {
        "4": {"content": "<end>", "special": True},
        "6": {"content": "<tool>", "special": False, "normalized": False},
        "5": {"content": "<think>", "special": True},
    }
    write(model, tokenizer_config={"added_tokens_decoder": added, "eos_token": "<think>"})
    info = copy_tokenizer(model, out)
    assert info is not None
    assert info.eos_token_ids == (5,)
    written = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert written.encode("a<think>b<tool>").ids == [0, 5, 1, 6]
    assert written.decode([0, 5, 6], skip_special_tokens=True) == "a <tool>"  # no decoder: spaces


def test_added_token_with_another_id(model: Path, out: Path) -> None:
    write(model, tokenizer_config={"added_tokens_decoder": {"9": {"content": "<tool>"}}})
    with pytest.raises(ExportError, match="gives '<tool>' the id 9, but the next free one is 5"):
        copy_tokenizer(model, out)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "special_tokens_map", "config", "generation_config"])
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_corrupt_files(model: Path, out: Path, name: str, content: str) -> None:
    (model / f"{name}.json").write_text(content)
    with pytest.raises(ExportError, match=rf"{name}\.json: expected"):
        copy_tokenizer(model, out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("listed", [[1], {"x": {"content": "c"}}, {"5": {}}, {"5": "c"}])
def test_broken_added_tokens(model: Path, out: Path, listed: Any) -> None:
    write(model, tokenizer_config={"added_tokens_decoder": listed})
    with pytest.raises(ExportError, match=r"tokenizer_config\.json: added_tokens_decoder: expected token ids with the"):
        copy_tokenizer(model, out)


def test_a_template_that_is_no_text(model: Path, out: Path) -> None:
    (model / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ExportError, match=r"chat_template\.jinja: expected UTF-8 text .*; download it again"):
        copy_tokenizer(model, out)


def test_ends_without_a_tokenizer(tmp_path: Path) -> None:
    """Gemma 3 says it in text_config, Qwen3 one of its two in generation_config.json alone."""
    write(tmp_path, generation_config={"eos_token_id": [7, 3]})
    assert stated_ends(tmp_path, {"eos_token_id": 3, "text_config": {"eos_token_id": [1, 9]}}) == (1, 3, 7, 9)
    assert stated_ends(tmp_path, {"text_config": 5, "eos_token_id": None}) == (3, 7)
