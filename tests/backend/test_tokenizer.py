"""Loading, encoding, decoding and checks of ids."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_tokenizers import byte_fallback, byte_fallback_parts, byte_level, smollm2
from tokenizers import processors

from dspark_backend.errors import ArtifactError, InvalidRequest
from dspark_backend.tokenizer import Tokenizer, TokenizerSettings


def saved(tmp_path: Path, settings: TokenizerSettings | None = None, post_processor: bool = False) -> Tokenizer:
    inner = byte_fallback_parts()
    if post_processor:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path, settings)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: expected the model's tokenizer, found no such file"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_corrupt_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: expected a tokenizer"):
        Tokenizer(tmp_path)


def test_merge_outside_the_vocabulary_is_a_clear_error(tmp_path: Path) -> None:
    """The library aborts with a panic, which is no Exception."""
    model = '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}'
    (tmp_path / "tokenizer.json").write_text(model)
    with pytest.raises(ArtifactError):
        Tokenizer(tmp_path)


def test_bos(tmp_path: Path) -> None:
    plain = saved(tmp_path).encode("hello")
    assert 1 not in plain
    assert saved(tmp_path, post_processor=True).encode("hello") == [1, *plain]
    assert saved(tmp_path, post_processor=True).encode("hello", add_special_tokens=False) == plain
    assert saved(tmp_path, TokenizerSettings(1, (2,), True)).encode("hello") == [1, *plain]
    assert saved(tmp_path, TokenizerSettings(1, (2,), True), post_processor=True).encode("hello") == [1, *plain]
    assert saved(tmp_path, TokenizerSettings(1, (2,), False), post_processor=True).encode("hello") == plain
    assert saved(tmp_path, TokenizerSettings(1, (2,), True)).encode("hello", add_special_tokens=False) == plain


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="add_bos is set but bos_token_id is not"):
        TokenizerSettings(add_bos=True)
    with pytest.raises(ArtifactError, match="bos_token_id names token 9999"):
        saved(tmp_path, TokenizerSettings(9999, (), True))


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    ids = saved(tmp_path).encode("hello world hello")
    assert len(ids) > 4
    assert saved(tmp_path).decode(ids) == "hello world hello"


def test_special_tokens_in_text() -> None:
    tokenizer = smollm2()
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "user\nHi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nHi<|im_end|>"


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_round_trip(text: str) -> None:
    assert byte_level().decode(byte_level().encode(text), skip_special_tokens=False) == text
    if "▁" not in text:
        assert byte_fallback().decode(byte_fallback().encode(text), skip_special_tokens=False) == text


def test_round_trip_of_a_real_vocabulary() -> None:
    text = "  def f(x):\n\treturn x ** 2  # naïve 日本語 👩‍👩‍👧 ½ Ж हिन्दी\r\n\n  end "
    assert smollm2().decode(smollm2().encode(text)) == text


def test_lone_surrogate() -> None:
    with pytest.raises(InvalidRequest, match="text_input: expected Unicode text"):
        byte_level().encode("a\ud800")


def test_ids() -> None:
    tokenizer = byte_level()
    assert tokenizer.vocab_size == 258
    with pytest.raises(InvalidRequest, match="expected 0 or more, got -3"):
        tokenizer.decode([-3])
    assert tokenizer.decode([*tokenizer.encode("ok"), 100_000]) == "ok"
    assert tokenizer.token(-1) is None


def test_threads() -> None:
    tokenizer = smollm2()
    texts = [f"Thread {index}: größer than {index * 7} 日本語" * 5 for index in range(200)]
    expected = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == expected
        assert list(pool.map(tokenizer.decode, expected)) == texts


def test_a_long_text_lets_other_threads_run() -> None:
    tokenizer, text = byte_level(), "hello world " * 10_000
    begun, rounds = threading.Event(), 0

    def encode() -> list[int]:
        begun.set()
        return tokenizer.encode(text)

    with ThreadPoolExecutor(1) as pool:
        ids = pool.submit(encode)
        begun.wait()
        while not ids.done():
            time.sleep(0.001)
            rounds += 1
    assert rounds > 20, "one that holds the interpreter stops every stream of a server"
    assert tokenizer.decode(ids.result()) == text


@pytest.mark.parametrize("special", [False, True])
def test_a_long_text_becomes_what_a_short_one_does(tmp_path: Path, special: bool) -> None:
    tokenizer = saved(tmp_path, post_processor=True)
    short = tokenizer.encode("hello world", add_special_tokens=special)
    long = tokenizer.encode("hello world" + " hello world" * 1000, add_special_tokens=special)
    assert long[: len(short)] == short and (long[0] == 1) is special
    assert len(long) - len(short) == 1000 * (len(short) - special)
    with pytest.raises(InvalidRequest, match="expected Unicode text"):
        tokenizer.encode("\ud800" * 5000)
