"""Beginnings of user turns, which the target completes: they steer what it asks about, and stay its own text.

A file has one beginning a line. What follows a tab is fixed and put behind what the target wrote (``\\n`` is a line
break there). A line ``[name]`` starts a domain, which the held-out curves tell apart; ``-`` leaves the whole turn to
the target; ``#`` starts a comment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dspark_export.errors import ExportError

OWN = "own"
"""Domain of turns that the target begins itself."""
_HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class Opening:
    """How a user turn begins and ends."""

    beginning: str = ""
    ending: str = ""
    domain: str = OWN


def read_openings(path: Path) -> list[Opening]:
    """The openings of a file, in order.

    Raises:
        ExportError: there is none in it, a line says nothing, or it is no UTF-8 text.
    """
    found: list[Opening] = []
    domain = path.stem
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ExportError(f"--openings {path}: expected UTF-8 text, got an invalid byte at {error.start}") from None
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if text.startswith("[") and text.endswith("]"):
            domain = text[1:-1].strip()
            if not domain:
                raise ExportError(f"--openings {path.name}, line {number}: expected the name of a domain, got {text}")
            continue
        beginning, _, ending = line.partition("\t")
        beginning = beginning.strip()
        if not beginning:
            raise ExportError(f"--openings {path.name}, line {number}: expected a beginning before the tab, got none")
        found.append(Opening("" if beginning == "-" else beginning, ending.rstrip().replace("\\n", "\n"), domain))
    if not found:
        raise ExportError(f"--openings {path.name}: expected one beginning of a user turn a line, got none")
    return found


class OpeningChoice:
    """Draws openings of a domain, of which every eighth is held out."""

    def __init__(self, openings: Sequence[Opening]) -> None:
        """Without openings every turn is the target's own."""
        self._kept: dict[str, list[Opening]] = {}
        self._held: dict[str, list[Opening]] = {}
        for domain in dict.fromkeys(opening.domain for opening in openings or [Opening()]):
            every = [opening for opening in openings or [Opening()] if opening.domain == domain]
            # Those that begin nothing are the same for both.
            fixed = [opening for opening in every if opening.beginning]
            held = fixed[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
            self._kept[domain] = [opening for opening in every if opening not in held]
            self._held[domain] = held or every

    @property
    def domains(self) -> list[str]:
        return list(self._kept)

    def draw(self, random: np.random.Generator, domain: str, held_out: bool) -> Opening:
        """One that is held out, or one that is not."""
        choices = (self._held if held_out else self._kept)[domain]
        return choices[int(random.integers(len(choices)))]


def alternating(domains: Sequence[str], found: Sequence[str], count: int) -> list[str]:
    """The domains of the next ``count`` draws: together with those ``found`` so far, as many of each as can be."""
    have = {domain: found.count(domain) for domain in domains}
    order: list[str] = []
    for _ in range(count):
        order.append(min(domains, key=have.__getitem__))
        have[order[-1]] += 1
    return order
