"""Text out of the engine: stop words, bad words, min_tokens, echo. The tiny model writes bytes."""

from __future__ import annotations

import pytest
from artifacts import variant
from engines import Driver, KeepingSink, request

from dspark_backend.delta import FinishReason
from dspark_backend.errors import InvalidRequest

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def driver(text_artifact, tmp_path_factory) -> Driver:
    # Without EOS: with min_tokens it is masked, which would change the draws that the tests compare.
    return Driver(variant(text_artifact, tmp_path_factory.mktemp("no-eos") / "artifact", eos_token_ids=[]))


def answer(driver: Driver, **options) -> KeepingSink:
    return driver.run(request(**{"text": PROMPT, "max_tokens": 40} | options))[0]


def readable_run(driver: Driver) -> tuple[KeepingSink, str, int]:
    """An answer, a piece of its text of at least three tokens, all of them whole characters, and the seed."""
    for seed in range(60):
        sink = answer(driver, temperature=1.0, seed=seed)
        text = sink.text()
        for start in range(3, len(text) - 4):
            piece = text[start : start + 4]
            if "\ufffd" not in piece and text.find(piece) == start and len(set(piece)) == 4:
                return sink, piece, seed
    raise AssertionError("no readable text in sixty answers")


def test_text_is_the_decoding_of_the_tokens(driver):
    sink = answer(driver)
    assert sink.text() == driver.tokenizer.decode(sink.tokens())
    assert sink.text()


class TestStopWords:
    def test_split_over_tokens(self, driver):
        free, stop, seed = readable_run(driver)
        sink = answer(driver, temperature=1.0, seed=seed, stop_words=("never there", stop))
        assert sink.text() == free.text()[: free.text().index(stop)]
        assert sink.reason() is FinishReason.STOP
        assert sink.tokens() == free.tokens()[: len(sink.tokens())]
        assert len(sink.tokens()) < len(free.tokens())

    def test_nothing_of_it_leaks_on_the_way(self, driver):
        free, stop, seed = readable_run(driver)
        sink = answer(driver, temperature=1.0, seed=seed, stop_words=(stop,))
        sent = ""
        for delta in sink.deltas:
            sent += delta.text
            assert free.text().startswith(sent) and len(sent) <= free.text().index(stop)

    def test_held_back_text_comes_at_the_end(self, driver):
        free, stop, seed = readable_run(driver)
        almost = stop[:2] + "\0never"
        sink = answer(driver, temperature=1.0, seed=seed, stop_words=(almost,))
        assert sink.text() == free.text()
        assert sink.reason() is FinishReason.LENGTH

    def test_not_before_min_tokens(self, driver):
        free, stop, seed = readable_run(driver)
        sink = answer(driver, temperature=1.0, seed=seed, stop_words=(stop,), min_tokens=40)
        assert sink.text() == free.text()

    def test_without_streaming(self, driver):
        free, stop, seed = readable_run(driver)
        sink = answer(driver, temperature=1.0, seed=seed, stop_words=(stop,), stream=False)
        assert sink.text() == free.text()[: free.text().index(stop)]
        assert len(sink.deltas) == 1


class TestBadWords:
    def test_never_generated(self, driver):
        free = answer(driver)
        word = next(char for char in free.text() if char != "\ufffd" and char.isprintable() and char != " ")
        sink = answer(driver, bad_words=(word,))
        assert word not in sink.text()
        assert len(sink.tokens()) == 40

    def test_of_several_tokens(self, driver):
        free, piece, seed = readable_run(driver)
        sink = answer(driver, temperature=1.0, seed=seed, bad_words=(piece,))
        # By tokens: this vocabulary has ids that write nothing, so that the letters can meet all the same.
        banned, tokens = driver.tokenizer.encode(piece), sink.tokens()
        assert all(tokens[at : at + len(banned)] != banned for at in range(len(tokens)))
        # Nothing is banned until the last of its tokens.
        at = free.text().index(piece)
        assert sink.text()[: at + len(piece) - 1] == free.text()[: at + len(piece) - 1]


class TestPrompts:
    @pytest.mark.parametrize("stream", [True, False])
    def test_echo(self, driver, stream):
        plain = answer(driver, stream=stream)
        assert answer(driver, echo=True, stream=stream).text() == PROMPT + plain.text()

    def test_echo_of_ids(self, driver):
        ids = tuple(driver.tokenizer.encode(PROMPT))
        assert answer(driver, text=None, input_ids=ids, echo=True).text() == PROMPT + answer(driver).text()

    def test_messages(self, driver):
        chat = answer(driver, text=None, messages='[{"role": "user", "content": "hi"}]')
        assert chat.tokens() == answer(driver, text="<user>hi<a>").tokens()

    def test_several_sequences_echo_each(self, driver):
        sink = answer(driver, echo=True, num_sequences=2, temperature=1.0, seed=1)
        assert all(sink.text(index).startswith(PROMPT) for index in range(2))


def test_everything_forbidden_costs_one_request(driver):
    """Bytes are all the tokenizer knows; with every one forbidden, tokens without text remain."""
    words = tuple(chr(code) for code in range(33, 127))
    sink = answer(driver, bad_words=words)
    assert sink.failure is None
    assert not set(sink.text()) & set(words)


def test_prompt_errors_come_before_the_queue(driver):
    with pytest.raises(InvalidRequest, match="expected at most 511 tokens"):
        answer(driver, text="x" * 512)
