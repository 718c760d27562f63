from __future__ import annotations

from pathlib import Path

from dspark_backend.serving import server_log

LOG = """\
I1124 13:55:29.812 57 pinned_memory_manager.cc:273] "Pinned memory pool is created"
E1124 13:55:29.813 57 server.cc:241] "CudaDriverHelper has not been initialized."
I1124 13:55:29.814 57 model_lifecycle.cc:472] "loading: dspark:1"
I1124 13:55:30.000 57 pb_stub.cc:418] "Failed to initialize Python stub: ArtifactError: verifier/1 is missing
At:
  model.py(12): initialize
"
E1124 13:55:31.000 57 model_lifecycle.cc:642] "failed to load 'dspark' version 1: Internal: ArtifactError: ...

At:
  model.py(12): initialize
"
I1124 13:55:31.100 57 server.cc:604]
+------------------+------+
| Repository Agent | Path |
+------------------+------+
error: creating server: Internal - failed to load all models
"""


def test_errors_are_picked_and_the_rest_is_left_out() -> None:
    lines = server_log.relevant_lines(LOG)
    assert any("failed to load 'dspark'" in line for line in lines)
    assert "  model.py(12): initialize" in lines
    assert lines[-1] == "error: creating server: Internal - failed to load all models"
    assert not any("CudaDriverHelper" in line or "Pinned" in line or "Repository Agent" in line for line in lines)


def test_a_log_without_errors_gives_its_end() -> None:
    assert server_log.relevant_lines("one\ntwo\nthree\n", limit=2) == ["two", "three"]


def test_earlier_runs_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("E1124 old\n")
    start = path.stat().st_size
    with path.open("a") as file:
        file.write("E1124 new\n")
    assert server_log.tail(path, start=start) == "E1124 new"
    assert server_log.tail(tmp_path / "missing") == ""
