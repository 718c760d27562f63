"""Reading a Triton log: the few lines that tell why a start failed."""

from __future__ import annotations

import re
from pathlib import Path

_ERROR = re.compile(
    r"^E\d{4} |Traceback \(most recent call last\)|^\w*(Error|Exception)\b|failed to load|^error: |Segmentation"
)
_HARMLESS = ("CudaDriverHelper has not been initialized", "Failed to initialize NVML")
_LINE_CHARS = 400
_TAIL_BYTES = 256 * 1024


def relevant_lines(text: str, limit: int = 20) -> list[str]:
    """The last ``limit`` lines of ``text`` that report an error with what follows it; its last lines if none does."""
    lines = [line.rstrip()[:_LINE_CHARS] for line in text.splitlines() if line.strip()]
    chosen: list[str] = []
    following = 0
    for line in lines:
        if _ERROR.search(line) and not any(phrase in line for phrase in _HARMLESS):
            following = 6
        elif re.match(r"^[IWV]\d{4} |^\+?[-+=]+\+?$|^\|", line):
            following = 0
        if following > 0:
            chosen.append(line)
            following -= 1
    return (chosen or lines)[-limit:]


def tail(path: Path | None, limit: int = 20, start: int = 0) -> str:
    """The relevant end of a log file, one string; empty where there is none.

    Args:
        start: bytes of the file that belong to earlier runs.
    """
    if path is None or not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - _TAIL_BYTES))
        return "\n".join(relevant_lines(file.read().decode(errors="replace"), limit))
