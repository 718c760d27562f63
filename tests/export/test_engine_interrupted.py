"""An interrupted command does not wait for the build in the process that it started."""

from __future__ import annotations

import time

import pytest

from dspark_export.engine import worker
from dspark_export.engine.builder import Builder, BuildSettings


def test_the_build_ends_with_the_command(tmp_path, monkeypatch):
    program = tmp_path / "builds"
    program.write_text("#!/bin/sh\necho progress 0.5\nexec sleep 20\n")
    program.chmod(0o755)
    monkeypatch.setattr(worker.sys, "executable", str(program))

    def interrupt(done: float) -> None:
        raise SystemExit(143)  # as SIGTERM does

    begin = time.monotonic()
    with pytest.raises(SystemExit):
        worker.build_apart(
            Builder("none", None), tmp_path / "graph", [], BuildSettings(()), tmp_path / "engine", interrupt
        )
    assert time.monotonic() - begin < 10
