"""What drafts add to a step against what the cost model says, learned from steps with drafts that follow ones without.

The model is measured in a few seconds, on machines where other work comes and goes: its plain steps may have had a good
moment and its wide ones a bad one. One factor for all steps (``cost_tracker``) cannot mend that, and where drafting all
but breaks even it decides who drafts.
"""

from __future__ import annotations

from dataclasses import dataclass

_PACE_MEMORY = 0.8
"""Weight of the past in the pace of plain steps: a machine's speed wanders within seconds."""
_FRESH = 32
"""Steps for which the pace of the last plain one is believed."""
_MEMORY = 0.995
"""Weight of the past in what was learned: where all draft, one plain step in dozens tells the pace, and errs."""
_PRIOR = 2.0
"""Weight of the model's own word, in plain steps."""
_PAUSE = 2.0
"""A step that took so many times as long, or as short, as expected tells of the machine."""
_MOST = 2.0
"""Times the model's surcharge, at most; at least half of it."""


@dataclass
class Surcharge:
    """Of steps with about as many requests. All arguments are seconds, and positive."""

    since_plain: int = 0
    """Steps since the last one without drafts."""
    _pace: float = 0.0
    """Actual / predicted of recent plain steps; 0 before the first."""
    _odd: bool = False
    """Whether the last plain step was far off this pace."""
    _added: float = 0.0
    """In plain steps, as ``_expected``: what drafts added, and what the model says of that."""
    _expected: float = 0.0

    def plain(self, predicted: float, actual: float) -> None:
        """A step without drafts."""
        pace = actual / predicted
        alike = self._pace / _PAUSE < pace < self._pace * _PAUSE
        # One that is far off was a pause of the machine. Two in succession: the first pace was, or it has changed.
        if not self._pace or self.since_plain > _FRESH or (self._odd and not alike):
            self._pace, alike = pace, True
        elif alike:
            self._pace = _PACE_MEMORY * self._pace + (1 - _PACE_MEMORY) * pace
        self._odd = not alike
        self.since_plain = 0

    def drafted(self, plain: float, predicted: float, actual: float) -> None:
        """A step with drafts, as the model has it without them and with them."""
        self.since_plain += 1
        if not self._pace or self.since_plain > _FRESH:
            return
        took = actual / self._pace
        if predicted / _PAUSE < took < predicted * _PAUSE:
            self._added = _MEMORY * self._added + (took - plain) / plain
            self._expected = _MEMORY * self._expected + (predicted - plain) / plain

    @property
    def scale(self) -> float:
        """What to multiply the model's surcharge for drafts by."""
        return min(max((self._added + _PRIOR) / (self._expected + _PRIOR), 1 / _MOST), _MOST)
