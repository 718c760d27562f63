"""Run a program that gets SIGTERM when its parent dies: ``python deathsig.py PARENT_PID PROGRAM [ARGUMENT...]``.

A script of its own rather than a ``preexec_fn``, which may deadlock in a process with threads. Linux delivers the
signal when the *thread* that started this script ends: start it from one that lives as long as the program should.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent, program = int(arguments[0]), arguments[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent ended before the program could start")
    os.execv(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
