"""Measured segments in a file of JSON lines, written at once: a run that was cut goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dspark_load.answer import Answer
from dspark_load.cell import Cell, Load
from dspark_load.errors import LoadError
from dspark_load.segment import Segment


class Journal:
    """Appends segments to a file; its first line names the settings that all of them share."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open or go on with a file.

        Raises:
            LoadError: it was begun with other settings.
        """
        self.path = path
        self.segments: list[Segment] = []
        begun = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if not begun:
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            return
        found = json.loads(begun[0])
        for key, value in settings.items():
            if found.get(key) != value:
                raise LoadError(
                    f"{path} was begun with {key} {found.get(key)!r}, now it is {value!r}: name another folder with "
                    "--out, or remove this one"
                )
        whole = [begun[0]]
        for line in begun[1:]:
            try:
                self.segments.append(_read(json.loads(line)))
            except json.JSONDecodeError:  # cut while it was written
                break
            whole.append(line)
        path.write_text("\n".join(whole) + "\n", encoding="utf-8")

    def has(self, cell: Cell, part: int) -> bool:
        return any(segment.cell == cell and segment.part == part for segment in self.segments)

    def add(self, segment: Segment) -> None:
        self.segments.append(segment)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(segment)) + "\n")


def _read(entry: dict[str, Any]) -> Segment:
    cell = entry.pop("cell")
    answers = [Answer(**answer) for answer in entry.pop("answers")]
    return Segment(cell=Cell(cell["policy"], Load(**cell["load"])), answers=answers, **entry)
