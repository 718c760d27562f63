"""Measured segments in a file of JSON lines, so that a run that was cut goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from speed.load import Answer


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    precision: str
    policy: str
    streams: int


@dataclass(frozen=True)
class Segment:
    """One stretch of one cell: the prompts of one part."""

    cell: Cell
    part: int
    answers: list[Answer]
    tokens: int
    seconds: float
    foreign_cores: float
    """Cores that other processes of the machine kept busy meanwhile."""

    @property
    def decode_secs(self) -> float:
        return sum(answer.decode_secs for answer in self.answers)


class Journal:
    """Appends segments to a file; its first line names the settings that all of them share."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open or go on with a file.

        Raises:
            SystemExit: it was begun with other settings.
        """
        self.path = path
        self.segments: list[Segment] = []
        begun = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if len(begun) < 2:
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            return
        found = json.loads(begun[0])
        differing = [key for key in settings if found.get(key) != settings[key]]
        if differing:
            key = differing[0]
            raise SystemExit(
                f"{path} was begun with {key} {found.get(key)!r}, now it is {settings[key]!r}: name another folder "
                "with --out, or remove this one"
            )
        whole = []
        for line in begun[1:]:
            try:
                self.segments.append(_read(json.loads(line)))
            except json.JSONDecodeError:  # cut while it was written
                break
            whole.append(line)
        path.write_text("\n".join([begun[0], *whole]) + "\n", encoding="utf-8")

    def has(self, cell: Cell, part: int) -> bool:
        return any(segment.cell == cell and segment.part == part for segment in self.segments)

    def add(self, segment: Segment) -> None:
        self.segments.append(segment)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(segment)) + "\n")

    def complete_parts(self, cells: Sequence[Cell]) -> list[int]:
        """The parts that every cell has: what may be compared."""
        parts = {segment.part for segment in self.segments}
        return sorted(part for part in parts if all(self.has(cell, part) for cell in cells))


def _read(entry: dict[str, Any]) -> Segment:
    answers = [Answer(**answer) for answer in entry.pop("answers")]
    return Segment(cell=Cell(**entry.pop("cell")), answers=answers, **entry)
