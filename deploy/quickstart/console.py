"""Progress in the terminal: what runs now, for how many seconds, and what went wrong. Standard library only."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TICK_SECS = 0.5
WIDTH = 100


class QuickstartError(Exception):
    """Something failed; the message names the cause and the remedy."""


def say(text: str) -> None:
    """One line for the user. Standard output is kept for answers."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextmanager
def stage(title: str, detail: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Show ``title`` with the seconds that pass, and how many it took in the end.

    Args:
        detail: on a terminal, asked twice a second for a few words about what goes on.
    """
    start = time.monotonic()
    live = sys.stderr.isatty()
    ended = threading.Event()

    def redraw() -> None:
        while not ended.wait(TICK_SECS):
            line = f"  {title} ... {time.monotonic() - start:.0f} s  {detail()}"[:WIDTH]
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()

    if live:
        ticker = threading.Thread(target=redraw, daemon=True)
        ticker.start()
    else:
        say(f"  {title} ...")
    outcome = "failed after"
    try:
        yield
        outcome = "done in"
    finally:
        ended.set()
        if live:
            ticker.join()
            sys.stderr.write("\r\x1b[K")
        say(f"  {title}: {outcome} {time.monotonic() - start:.1f} s")
