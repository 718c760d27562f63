"""``dspark-serve`` with settings that cannot work: one line, the exit code of wrong settings, nothing started."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_backend.serving import cli


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command takes over signals; the tests' process wants them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--http-port", "0"], "http port: expected 1 to 65535, got 0"),
        (["--grpc-port", "0"], "grpc port: expected 1 to 65535, got 0"),
        (["--metrics-port", "0"], "metrics port: expected 1 to 65535, got 0"),
        (["--host", "no.such.host.invalid"], "host: expected an IPv4 address"),
        (["--host", "::"], "host: expected an IPv4 address"),
        (["--log-file", "."], "log file: expected a file that can be written"),
        (["--log-file", "/proc/no/file"], "log file: expected a file that can be written"),
    ],
)
def test_wrong_settings_exit_2_and_say_why(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model" / "1").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        base = ["--model-repository", str(tmp_path), "--port-base", "25431", "--tritonserver", "/bin/false"]
        cli.main([*base, "--no-clean-orphans", *arguments])
    assert ended.value.code == cli.EXIT_USAGE
    assert words in capsys.readouterr().err
