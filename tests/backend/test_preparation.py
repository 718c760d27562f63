"""Requests to prepared ones, and every reason to refuse."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from engines import request

from dspark_backend.errors import InvalidRequest
from dspark_backend.preparation import Preparer
from dspark_backend.stages.artifact import load_verifier_artifact
from dspark_backend.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def artifact(text_artifact):
    return load_verifier_artifact(text_artifact)


@pytest.fixture(scope="module")
def tokenizer(text_artifact) -> Tokenizer:
    return Tokenizer(text_artifact)


@pytest.fixture
def preparer(artifact, tokenizer) -> Preparer:
    return Preparer(artifact, tokenizer, max_context=100, max_sequences=4, default_max_tokens=20)


@pytest.fixture
def without(artifact) -> Preparer:
    return Preparer(artifact, None, max_context=100, max_sequences=4, default_max_tokens=20)


def refuses(preparer: Preparer, message: str, **options) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        preparer.prepare(request(**options))


class TestLimits:
    def test_default(self, preparer):
        prepared = preparer.prepare(request(text="abc"))
        assert (len(prepared.prompt_ids), prepared.max_tokens, prepared.reserve) == (3, 20, 22)

    def test_the_context_cuts(self, preparer):
        assert preparer.prepare(request(text="a" * 90)).max_tokens == 10
        assert preparer.prepare(request(text="a" * 99)).max_tokens == 1
        assert preparer.prepare(request(text="a", max_tokens=5000)).max_tokens == 99

    def test_min_tokens_lift_the_default(self, preparer):
        assert preparer.prepare(request(text="abc", min_tokens=50)).max_tokens == 50

    def test_too_long(self, preparer):
        refuses(preparer, "prompt: expected at most 99 tokens (the context holds 100", text="a" * 100)
        refuses(preparer, "prompt: expected at most 99 tokens", input_ids=(1,) * 100)

    def test_min_tokens_beyond_the_context(self, preparer):
        refuses(preparer, "min_tokens: expected at most 97", text="abc", min_tokens=98)

    def test_sequences(self, preparer):
        refuses(
            preparer,
            "num_return_sequences: expected at most 4 (the engine's max_slots), got 5",
            text="a",
            num_sequences=5,
        )

    def test_bytes(self, artifact, tokenizer):
        refuses(Preparer(artifact, tokenizer, 100, 4, 20), "text_input: expected at most 1600 bytes", text="a" * 1601)
        small = Preparer(artifact, tokenizer, 100, 4, 20, max_prompt_bytes=10)
        refuses(small, "text_input: expected at most 10 bytes (a context of 100 tokens), got 12", text="\u00e9" * 6)
        refuses(small, "messages: expected at most 10 bytes", messages='[{"role": "user", "content": "x"}]')


class TestPrompts:
    def test_forms(self, preparer, tokenizer):
        assert preparer.prepare(request(text="hi")).prompt_ids == tuple(tokenizer.encode("hi"))
        assert preparer.prepare(request(input_ids=(3, 4))).prompt_ids == (3, 4)
        chat = preparer.prepare(request(messages='[{"role": "user", "content": "hi"}]'))
        assert chat.prompt_ids == tuple(tokenizer.encode("<user>hi<a>"))

    def test_echo_text(self, preparer):
        assert preparer.prepare(request(text="hi", echo=True)).prompt_text == "hi"
        assert preparer.prepare(request(text="hi")).prompt_text == ""
        chat = request(messages='[{"role": "user", "content": "hi"}]', echo=True)
        assert preparer.prepare(chat).prompt_text == "<user>hi<a>"

    def test_empty(self, preparer):
        refuses(preparer, "prompt: expected at least one token, got an empty prompt", text="")

    def test_bad_messages(self, preparer):
        refuses(preparer, "messages: expected a JSON list of messages, got malformed JSON", messages="{")

    @pytest.mark.parametrize("token", [300, 2**31 - 1])
    def test_ids_outside_the_vocabulary(self, preparer, token):
        refuses(preparer, f"input_ids: expected ids from 0 to 299, got {token} at index 1", input_ids=(1, token))

    def test_tokens_that_only_the_tokenizer_knows(self, artifact, tokenizer):
        """Such an id would fail a whole step of the graph, other requests included."""
        narrow = Preparer(replace(artifact, vocab_size=200), tokenizer, 100, 4, 20)
        token = next(i for i in range(200, 256) if len(tokenizer.encode(tokenizer.decode([i]))) == 1)
        refuses(narrow, "prompt: expected ids from 0 to 199, got", text=tokenizer.decode([token]) + "\uffff")

    def test_lone_surrogates(self, preparer):
        refuses(preparer, "text_input: expected Unicode text", text="a\ud800")


class TestWithoutTokenizer:
    def test_ids_alone(self, without):
        assert without.prepare(request(input_ids=(1, 2))).prompt_ids == (1, 2)
        assert without.prepare(request(input_ids=(1, 2), echo=True)).prompt_text == ""

    @pytest.mark.parametrize("form", ["text", "messages"])
    def test_text_is_refused(self, without, form):
        refuses(without, "this model was exported without a tokenizer; send input_ids instead", **{form: "[]"})

    @pytest.mark.parametrize("option", ["stop_words", "bad_words"])
    def test_words_are_refused(self, without, option):
        refuses(without, f"{option}: expected none", input_ids=(1,), **{option: ("x",)})

    def test_no_chat_template(self, artifact, tokenizer):
        plain = Preparer(replace(artifact, chat_template=None), tokenizer, 100, 4, 20)
        refuses(plain, "messages: this model has no chat template", messages='[{"role": "user", "content": "x"}]')


class TestMask:
    def test_bad_words_with_and_without_a_space(self, preparer, tokenizer):
        mask = preparer.prepare(request(text="a", bad_words=("x", " yz"))).mask
        spelled = [tuple(tokenizer.encode(word)) for word in ("x", " x", " yz")]
        assert sorted(mask.bad_words.sequences) == sorted(spelled)

    def test_ends(self, preparer, artifact):
        mask = preparer.prepare(request(text="a", min_tokens=3)).mask
        assert mask.end_ids == artifact.eos_token_ids == (256,)
        assert mask.min_tokens == 3

    def test_ids_outside_the_vocabulary_are_left_out(self, artifact, tokenizer):
        narrow = Preparer(replace(artifact, vocab_size=150, eos_token_ids=(7, 256)), tokenizer, 100, 4, 20)
        token = next(i for i in range(150, 256) if tokenizer.decode([i]) != "\ufffd")
        mask = narrow.prepare(request(input_ids=(1,), bad_words=("A", tokenizer.decode([token])), min_tokens=1)).mask
        assert mask.end_ids == (7,)
        assert all(max(sequence) < 150 for sequence in mask.bad_words.sequences)
        assert mask.bad_words.sequences
