"""Runs a command where personality(2) cannot be changed, as under the seccomp profile of common containers:
``python no_personality.py COMMAND ...``."""

from __future__ import annotations

import ctypes
import os
import struct
import sys

_PERSONALITY = 135  # of x86-64
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_REFUSE, _ALLOW = 0x00050001, 0x7FFF0000  # EPERM
_FILTER = [
    (_LOAD, 0, 0, 0),  # the call's number
    (_EQUAL, 0, 4, _PERSONALITY),
    (_LOAD, 0, 0, 16),  # its first argument
    (_EQUAL, 2, 0, 0xFFFFFFFF),  # only asks
    (_ANY_BIT, 0, 1, 0x0040000),
    (_RETURN, 0, 0, _REFUSE),
    (_RETURN, 0, 0, _ALLOW),
]


def refuse() -> None:
    """For this process and those it starts, for good."""
    code = b"".join(struct.pack("HBBI", *line) for line in _FILTER)
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(_FILTER), ctypes.addressof(held))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    no_new_privileges, set_seccomp, filters = 38, 22, 2
    if prctl(no_new_privileges, 1, 0, 0, 0) or prctl(set_seccomp, filters, program, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot set a seccomp filter")


if __name__ == "__main__":
    refuse()
    os.execvp(sys.argv[1], sys.argv[1:])
