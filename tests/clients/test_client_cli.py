"""The command line where no server is needed: arguments, exit codes, one line of error."""

import io
import json

import pytest
from scripted_server import piece as scripted
from scripted_server import serving

from dspark_client import cli
from dspark_client.cli_options import SamplingOptions, parse_ids
from dspark_client.cli_output import write_usage
from dspark_client.completion import Piece, Usage
from dspark_client.errors import DSparkClientError, InvalidRequestError, ServerError
from dspark_client.options import GenerateOptions

NOWHERE = ["--url", "localhost:1", "--retries", "0"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing command"),
        (["bogus"], "bogus"),
        (["generate"], "prompt"),
        (["generate", "x", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "x", "--no-such-option"], "--no-such-option"),
        (["generate", "x", "--max-tokens", str(2**31), *NOWHERE], "max_tokens: expected an integer"),
        (["generate", "x", "--seed", "-1", *NOWHERE], "seed: expected"),
        (["generate", "1 2 x", "--ids", *NOWHERE], "token ids"),
        (["generate", "", "--ids", *NOWHERE], "input_ids: expected at least one"),
        (["generate", "1", "--ids", "--chat", *NOWHERE], "got both"),
        (["generate", "x", "--url", "http://localhost:8000"], "host:port"),
        (["generate", "x", "--header", "novalue", *NOWHERE], "name=value"),
        (["generate", "x", "--header", "a b=c", *NOWHERE], "headers: expected"),
        (["generate", "x", "--compression", "zip", *NOWHERE], "gzip"),
        (["generate", "x", "--tls-ca", "missing.pem", *NOWHERE], "PEM"),
        (["generate", "x", "--tls-cert", "a.pem", *NOWHERE], "together"),
        (["generate", "x", "--timeout", "0", *NOWHERE], "timeout: expected"),
        (["models", "--retries", "-1"], "--retries"),
        (["stats", "--url", "https://localhost"], "host:port"),
    ],
)
def test_wrong_arguments_exit_2_with_one_line(arguments, words, capsys):
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words.lower() in captured.err.lower()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("dspark: ")


@pytest.mark.parametrize("command", [["generate", "x"], ["models"], ["stats"], ["generate", "x", "--no-stream"]])
def test_nobody_listening_exits_4(command, capsys):
    assert cli.run([*command, *NOWHERE]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "localhost:1" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["models"], ["stats"]])
def test_help(command, capsys):
    assert cli.run([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage" in out
    if command:
        assert "--url" in out


def test_every_kind_of_error_has_its_own_code():
    assert set(DSparkClientError.__subclasses__()) == {*cli.EXIT_CODES, ServerError}
    codes = [*cli.EXIT_CODES.values(), cli.EXIT_SERVER_ERROR, cli.EXIT_INTERRUPTED, 0]
    assert len(set(codes)) == len(codes)


def test_options_not_given_are_left_to_the_server():
    assert SamplingOptions().generate_options() == GenerateOptions()


def test_options_given_are_sent():
    sampling = SamplingOptions(max_tokens=3, stop=["a", "b"], bad_word=["c"], ignore_eos=True, log_probs=True, seed=0)
    assert sampling.generate_options(sequences=2, echo=True) == GenerateOptions(
        max_tokens=3,
        stop_words=["a", "b"],
        bad_words=["c"],
        ignore_eos=True,
        return_log_probs=True,
        seed=0,
        num_return_sequences=2,
        exclude_input_in_output=False,
    )


def test_token_ids_are_read():
    assert parse_ids("1, 2\n3,4") == [1, 2, 3, 4]
    with pytest.raises(InvalidRequestError):
        parse_ids("1.5")


def test_json_is_one_line_that_reads_back(capsys):
    piece = Piece(0, "ü\n", (1,), (-0.5,), "stop", Usage(1, 1, 0, 0, 0, 1, 0, 0, 0, 0))
    cli.output.write_json(piece)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert json.loads(line)["text"] == "ü\n"
    assert json.loads(line)["usage"]["rounds"] == 1


@pytest.mark.parametrize("arguments", [["generate", "x"], ["chat"]])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_stats_are_told_whatever_the_form_of_the_answer(arguments, form, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    with serving([scripted("a"), scripted("b", last=True)]) as (_, url):
        assert cli.run([*arguments, *form, "--stats", "--url", url]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == (2 if form else 1)
    assert captured.err.startswith("1 tokens in, 1 out") and captured.err.count("\n") == 1


def test_a_character_that_stdout_lacks_does_not_cost_the_answer(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with serving([scripted("\u20ac"), scripted("b", last=True)]) as (_, url), pytest.raises(SystemExit) as ended:
        monkeypatch.setattr("sys.argv", ["dspark", "generate", "x", "--url", url])
        cli.main()
    assert (ended.value.code, raw.getvalue()) == (0, b"\\u20acb\n")


def test_url_comes_from_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("DSPARK_URL", "localhost:2")
    assert cli.run(["models", "--retries", "0"]) == 4
    assert "localhost:2" in capsys.readouterr().err


def test_usage_speaks_of_drafts_where_there_were_any(capsys):
    write_usage(Usage(3, 11, 0, 0, 0, 10, 0, 0, 0, 10**9))
    assert capsys.readouterr().err == "3 tokens in, 11 out; first after 0 ms, then 10.0 tokens/s\n"
    write_usage(Usage(3, 11, 25, 10, 5, 5, 0, 0, 0, 10**9))
    assert capsys.readouterr().err.endswith("; 2.00 tokens a round, 50% of verified drafts accepted\n")
