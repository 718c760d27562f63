"""The parser of perf_analyzer's export, on a recorded one: five answers of 12 tokens, two streams, policy fixed:5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dspark_load import prompts
from dspark_load.cell import Cell, Load
from dspark_load.errors import LoadError
from dspark_load.profile_export import read
from dspark_load.segment import SLICES, reduce, window

RECORDED = Path(__file__).parent / "data" / "perf_analyzer_profile.json"


@pytest.fixture(scope="module")
def domains() -> dict[str, str]:
    folder = Path(__file__).resolve().parents[2] / "deploy" / "load" / "prompts"
    return {prompt.messages: prompt.domain for prompt in prompts.read(folder, 0)}


def changed(tmp_path: Path, change) -> Path:
    """The recorded export with something else in it."""
    content = json.loads(RECORDED.read_bytes().decode("latin-1"), strict=False)
    change(content["experiments"][0]["requests"])
    path = tmp_path / "profile.json"
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode("latin-1"))
    return path


def test_answers_carry_the_servers_counts_and_the_tools_clock(domains):
    profile = read(RECORDED, domains)
    assert [answer.tokens for answer in profile.answers] == [12] * 5
    assert [answer.rounds for answer in profile.answers] == [11, 9, 9, 10, 11]
    assert [answer.verified for answer in profile.answers] == [40, 35, 32, 35, 40]
    assert [answer.accepted for answer in profile.answers] == [0, 2, 2, 1, 0]
    assert [answer.domain for answer in profile.answers] == ["code", "chat", "math", "chat", "code"]
    first = profile.answers[0]
    assert first.sent == 0.0
    assert first.ttft == pytest.approx(0.111538622)
    assert first.itl == pytest.approx((0.635512666 - 0.111538622) / 11)
    assert first.per_second == pytest.approx(1 / first.itl)


def test_several_tokens_of_one_response_are_counted(domains):
    arrivals = read(RECORDED, domains).arrivals
    assert sum(tokens for _, tokens in arrivals) == 60
    assert len(arrivals) < 60, "speculation put two tokens into some responses"
    assert arrivals == sorted(arrivals)


def test_the_window_of_a_closed_loop_is_without_its_beginning_and_its_end(domains):
    profile = read(RECORDED, domains)
    begin, end = window(profile.answers)
    starts, ends = [a.sent for a in profile.answers], [a.last for a in profile.answers]
    assert max(starts) < end == sorted(ends)[3]
    assert begin == sorted(ends)[0]
    segment = reduce(Cell("fixed:5", Load("closed", 2.0)), 0, profile)
    assert (segment.begin, segment.end, segment.seconds) == (begin, end, end - begin)
    assert len(segment.slices) == SLICES
    assert sum(segment.slices) == sum(tokens for when, tokens in profile.arrivals if begin < when <= end) < 60
    assert segment.aggregate == sum(segment.slices) / segment.seconds
    assert len(segment.counted) == 2, "two began in the crowd, the last was made alone for most of its time"


def test_a_loop_with_one_request_a_stream_is_measured_whole(domains):
    alike = read(RECORDED, domains).answers[:2]
    assert window(alike) == (0.0, min(answer.last for answer in alike))


def test_all_answers_of_an_open_loop_count(domains):
    profile = read(RECORDED, domains)
    segment = reduce(Cell("fixed:5", Load("open", 3.0)), 0, profile)
    assert (segment.begin, segment.end) == (0.0, max(answer.last for answer in profile.answers))
    assert sum(segment.slices) == 60
    assert segment.counted == profile.answers


def test_a_refused_request_is_an_error(tmp_path):
    def refuse(requests):
        for outputs in requests[2]["response_outputs"]:
            outputs["num_output_tokens"] = ""

    with pytest.raises(LoadError, match="ended without num_output_tokens"):
        read(changed(tmp_path, refuse), {})


def test_a_lost_response_is_an_error(tmp_path):
    def lose(requests):
        del requests[1]["response_outputs"][3], requests[1]["response_timestamps"][3]

    with pytest.raises(LoadError, match=r"the server counted 12 tokens, the responses held (10|11)"):
        read(changed(tmp_path, lose), {})


@pytest.mark.parametrize("content", [b"", b"{}", b'{"experiments": [{}]}', b'{"experiments": [{"requests": []}]}'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(LoadError, match="expected"):
        read(path, {})


def test_prompts_are_found_again_by_their_text(tmp_path):
    text = "Grüße — 你好"

    def ask(requests):
        for request in requests:
            request["request_inputs"] = {"text_input": text.encode().decode("latin-1")}

    assert {answer.domain for answer in read(changed(tmp_path, ask), {text: "chat"}).answers} == {"chat"}
