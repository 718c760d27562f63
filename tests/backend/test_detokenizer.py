"""Incremental text equals whole-text decoding, however the ids are cut."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_tokenizers import ALL, byte_fallback, byte_fallback_parts, byte_level, no_prefix_space, save, smollm2
from tokenizers import decoders

from dspark_backend.detokenizer import IncrementalDetokenizer
from dspark_backend.errors import ArtifactError
from dspark_backend.tokenizer import Tokenizer

Make = Callable[[], Tokenizer]
each_tokenizer = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
TEXTS = st.text(
    st.sampled_from([*"hello wrd日本é\u0301 \n▁\ufffd\u200d\U0001f469\U0001f1e9\U0001f3fd\x00"])
    | st.characters(codec="utf-8")
)


def pieces(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    out = [detokenizer.push(ids[start:end]) for start, end in pairwise(bounds)]
    return [*out, detokenizer.finish()]


@each_tokenizer
@settings(max_examples=300, deadline=None)
@given(data=st.data(), cuts=st.lists(st.integers(0, 1000), max_size=12), skip=st.booleans())
def test_random_ids(make: Make, data: st.DataObject, cuts: list[int], skip: bool) -> None:
    tokenizer = make()
    # Small ids are bytes and special tokens; some lie beyond the vocabulary, as in models with padded logits.
    one = st.integers(0, min(300, tokenizer.vocab_size + 2)) | st.integers(0, tokenizer.vocab_size + 5)
    ids = data.draw(st.lists(one, max_size=40))
    assert "".join(pieces(tokenizer, ids, cuts, skip)) == tokenizer.decode(ids, skip)


@each_tokenizer
@settings(max_examples=300, deadline=None)
@given(text=TEXTS, data=st.data())
def test_random_text_a_token_at_a_time(make: Make, text: str, data: st.DataObject) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids, list(range(len(ids))))) == tokenizer.decode(ids)
    drop = data.draw(st.integers(0, len(ids)))  # a character may lose some of its bytes
    ids = ids[:drop] + ids[drop + 1 :]
    assert "".join(pieces(tokenizer, ids, list(range(len(ids))))) == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [byte_level, byte_fallback, no_prefix_space], ids=lambda make: make.__name__)
@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=24) | st.lists(st.sampled_from([*b"\xe2\x82\xac\xf0\x9f\x91\xa9\xed\xa0\xc0\x80a"])))
def test_any_bytes(make: Make, data: bytes | list[int]) -> None:
    tokenizer = make()
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if make is byte_level:
        names = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    index = {tokenizer.token(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    ids = [index[names[byte]] for byte in bytes(data)]
    assert "".join(pieces(tokenizer, ids, list(range(len(ids))))) == tokenizer.decode(ids)


def test_every_token_alone() -> None:
    tokenizer = smollm2()
    wrong = [
        token_id
        for token_id in range(tokenizer.vocab_size)
        if "".join(pieces(tokenizer, [token_id], [], skip=False)) != tokenizer.decode([token_id], False)
    ]
    assert wrong == []


def test_characters_come_out_whole_and_at_once() -> None:
    tokenizer = smollm2()
    text = f"Hi {FAMILY} 日本語 naïve"
    out = pieces(tokenizer, tokenizer.encode(text), list(range(200)))
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)
    assert out[-1] == ""
    first = IncrementalDetokenizer(tokenizer)
    assert first.push(tokenizer.encode("Hello")) == "Hello"  # nothing waits without need


def test_replacement_characters_do_not_pile_up() -> None:
    """A stream of invalid bytes is sent as it comes: it must not wait for an end that may never be."""
    for tokenizer, token in ((byte_level(), "ÿ"), (byte_fallback(), "<0xFF>")):
        bad = next(token_id for token_id in range(tokenizer.vocab_size) if tokenizer.token(token_id) == token)
        detokenizer = IncrementalDetokenizer(tokenizer)
        assert [detokenizer.push([bad]) for _ in range(50)] == ["\ufffd"] * 50
        assert detokenizer.finish() == ""


def test_byte_run_waits_because_a_later_byte_can_break_it() -> None:
    tokenizer = byte_fallback()
    index = {tokenizer.token(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    euro = [index[f"<0x{byte:02X}>"] for byte in "€".encode()]
    broken = IncrementalDetokenizer(tokenizer)
    assert broken.push(euro) == ""
    assert broken.push([index["<0xFF>"]]) == "\ufffd" * 4 == tokenizer.decode([*euro, index["<0xFF>"]])
    whole = IncrementalDetokenizer(tokenizer)
    assert whole.push(euro) == ""
    assert whole.push([index["▁"]]) == "€ "


def test_prime_keeps_the_leading_space_and_completes_the_prompts_character() -> None:
    tokenizer = byte_fallback()
    prompt, answer = tokenizer.encode("hello"), tokenizer.encode("world")
    assert tokenizer.decode(answer) == "world"
    detokenizer = IncrementalDetokenizer(tokenizer)
    detokenizer.prime(prompt)
    assert detokenizer.push(answer) == " world"

    tokenizer = byte_level()
    ids = tokenizer.encode("a€b")
    detokenizer = IncrementalDetokenizer(tokenizer)
    detokenizer.prime(ids[:2])
    assert detokenizer.push(ids[2:]) + detokenizer.finish() == "€b"


@pytest.mark.parametrize("make", [byte_fallback, no_prefix_space], ids=lambda make: make.__name__)
def test_characters_that_end_the_prompt_are_not_said_again(make: Make) -> None:
    tokenizer = make()
    index = {tokenizer.token(token_id): token_id for token_id in range(tokenizer.vocab_size)}

    def bytes_of(text: bytes) -> list[int]:
        return [index[f"<0x{byte:02X}>"] for byte in text]

    def answer(prompt: bytes, *then: int) -> str:
        detokenizer = IncrementalDetokenizer(tokenizer)
        detokenizer.prime(bytes_of(prompt))
        return "".join(detokenizer.push([token]) for token in then) + detokenizer.finish()

    smile = "\U0001f600".encode()
    assert answer(smile, index["hello"]) == "hello"
    assert answer(smile) == ""
    assert answer(smile, *bytes_of("€".encode()), index["hello"]) == "€hello"
    assert answer(smile + smile[:3], *bytes_of(smile[3:]), index["hello"]) == "\U0001f600hello"
    assert answer(smile, *bytes_of(b"\xff"), index["hello"]) == "\ufffdhello"
    assert answer(b"\xff", index["hello"]) == "hello"
    for cut in range(4):
        assert answer(b"x" * cut + 30 * "€".encode(), *bytes_of("€".encode())) == "€"


@settings(max_examples=200, deadline=None)
@given(prompt=TEXTS, answer=TEXTS)
@pytest.mark.parametrize("make", [byte_level, byte_fallback, no_prefix_space], ids=lambda make: make.__name__)
def test_prime_equals_decoding_both(make: Make, prompt: str, answer: str) -> None:
    tokenizer = make()
    first, then = tokenizer.encode(prompt), tokenizer.encode(answer)
    together, alone = IncrementalDetokenizer(tokenizer), IncrementalDetokenizer(tokenizer)
    held = tokenizer.decode(first).removeprefix(together.push(first))
    alone.prime(first)
    got, expected = alone.push(then) + alone.finish(), together.push(then) + together.finish()
    # A run of byte tokens at the prompt's end comes out late, but it is the prompt's.
    assert expected.startswith(held)
    expected = expected[len(held) :]
    assert got.removeprefix(" ") == expected.removeprefix(" ")
    assert got == expected or not tokenizer.decode(first)


def test_cost_of_a_token_does_not_grow() -> None:
    tokenizer = smollm2()
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog. 日本語 ")
    detokenizer = IncrementalDetokenizer(tokenizer)
    start, count = time.perf_counter(), 0
    while count < 20_000:
        for token_id in ids:
            detokenizer.push([token_id])
        count += len(ids)
    assert (time.perf_counter() - start) / count < 50e-6  # about 2 us; re-decoding all would take milliseconds


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    ],
)
def test_decoders_that_cannot_be_streamed_are_refused_at_load(decoder: object) -> None:
    inner = byte_fallback_parts()
    inner.decoder = decoder
    with pytest.raises(ArtifactError, match="cannot be streamed"):
        save(inner)
