"""Tokens to text as a stream: each decoder step of a ``tokenizer.json``, rewritten to work piece by piece.

A window that is decoded again and again (the usual way) cannot be exact: a byte that turns out invalid changes text
already sent, a leading space depends on what came before, and runs of U+FFFD make the window grow without bound. So
each step here keeps just the state that its whole-text counterpart needs, and holds back only what can still change.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dspark_backend.errors import ArtifactError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


class Step:
    """One decoder step of one sequence. Pieces are tokens, until a step joins them: then any split of the text."""

    def push(self, pieces: list[str]) -> list[str]:
        """The output that is final after these pieces."""
        raise NotImplementedError

    def finish(self) -> list[str]:
        """What was held back, once nothing more comes."""
        return []

    def start_midway(self) -> None:
        """Behave as if text had come before: nothing is treated as the beginning of the answer."""

    def end_prompt(self) -> None:
        """What came until now was the prompt: none of its whole characters may come out any more."""


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + offset): byte for offset, byte in enumerate(rest)})
    return alphabet


_BYTE_ALPHABET = _byte_alphabet()


class ByteLevel(Step):
    """Byte-level BPE: all tokens' bytes form one UTF-8 stream; joins the pieces."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, pieces: list[str]) -> list[str]:
        text = self._utf8.decode(b"".join(map(self._bytes, pieces)))
        return [text] if text else []

    def finish(self) -> list[str]:
        text = self._utf8.decode(b"", final=True)
        return [text] if text else []

    @staticmethod
    def _bytes(token: str) -> bytes:
        try:
            return bytes([_BYTE_ALPHABET[char] for char in token])
        except KeyError:  # an added token with other characters stands for its own text
            return token.encode()


class ByteFallback(Step):
    """Tokens ``<0x00>`` to ``<0xFF>``: a run of them is its UTF-8 text or, if invalid anywhere, one U+FFFD a byte.

    So a run's text is final only when the run ends, or as soon as it cannot become valid any more. Of a run that begins
    in the prompt only what follows the prompt's whole characters counts.
    """

    def __init__(self) -> None:
        self._tail = 0
        self._restart()

    def start_midway(self) -> None:
        # A prompt is not read from its beginning, so that a run of it may seem to start inside a character.
        self._tail = 3

    def _restart(self) -> None:
        self._run = 0
        self._broken = False
        self._text: list[str] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")

    def push(self, pieces: list[str]) -> list[str]:
        out: list[str] = []
        for piece in pieces:
            match = _BYTE_TOKEN.fullmatch(piece)
            if match is None:
                self._tail = 0
                out += self.finish()
                out.append(piece)
            else:
                self._push_byte(int(match[1], 16), out)
        return out

    def _push_byte(self, byte: int, out: list[str]) -> None:
        if self._tail and 0x80 <= byte < 0xC0:
            self._tail -= 1
            return
        self._tail = 0
        self._run += 1
        if not self._broken:
            try:
                self._text.append(self._utf8.decode(bytes([byte])))
                return
            except UnicodeDecodeError:
                self._broken = True
                out += [_REPLACEMENT] * (self._run - 1)
        out.append(_REPLACEMENT)

    def end_prompt(self) -> None:
        self._tail = 0
        if not self._broken:
            self._run -= len("".join(self._text).encode())
            self._text = []

    def finish(self) -> list[str]:
        if not self._run:
            return []
        out: list[str] = []
        if not self._broken:
            try:
                self._utf8.decode(b"", final=True)
                out = ["".join(self._text)]
            except UnicodeDecodeError:
                out = [_REPLACEMENT] * self._run
        self._restart()
        return out


class Fuse(Step):
    """Joins the pieces."""

    def push(self, pieces: list[str]) -> list[str]:
        return pieces


@dataclass
class Replace(Step):
    """Replaces a string inside each piece."""

    old: str
    new: str

    def push(self, pieces: list[str]) -> list[str]:
        return [piece.replace(self.old, self.new) for piece in pieces]


@dataclass
class StripEach(Step):
    """Strips up to ``start`` leading and ``stop`` trailing characters ``content`` from each token."""

    content: str
    start: int
    stop: int

    def push(self, pieces: list[str]) -> list[str]:
        return [self._strip(piece) for piece in pieces]

    def _strip(self, piece: str) -> str:
        head, tail = 0, len(piece)
        while head < min(self.start, len(piece)) and piece[head] == self.content:
            head += 1
        while tail > max(head, len(piece) - self.stop) and piece[tail - 1] == self.content:
            tail -= 1
        return piece[head:tail]


@dataclass
class StripStart(Step):
    """Strips up to ``left`` leading characters ``content`` from the whole text."""

    content: str
    left: int

    def push(self, pieces: list[str]) -> list[str]:
        if self.left == 0:
            return pieces
        text = "".join(pieces)
        head = 0
        while head < min(self.left, len(text)) and text[head] == self.content:
            head += 1
        self.left = self.left - head if head == len(text) else 0
        return [text[head:]] if head < len(text) else []

    def start_midway(self) -> None:
        self.left = 0


@dataclass
class Metaspace(Step):
    """The replacement character is a space, but nothing in the first token where the encoder had added it there."""

    replacement: str
    drop_in_first: bool

    def push(self, pieces: list[str]) -> list[str]:
        out = [piece.replace(self.replacement, " ") for piece in pieces]
        if self.drop_in_first and pieces:
            self.drop_in_first = False
            out[0] = pieces[0].replace(self.replacement, "")
        return out

    def start_midway(self) -> None:
        self.drop_in_first = False


class JoinWithSpaces(Step):
    """What the library does without any decoder."""

    def __init__(self) -> None:
        self._first = True

    def push(self, pieces: list[str]) -> list[str]:
        out = [piece if self._first and not at else " " + piece for at, piece in enumerate(pieces)]
        self._first = self._first and not pieces
        return out

    def start_midway(self) -> None:
        self._first = False


class DecoderPlan:
    """How this tokenizer turns tokens into text: a recipe from which each sequence takes its own steps."""

    def __init__(self, makers: tuple[Callable[[], Step], ...]) -> None:
        self._makers = makers

    def steps(self) -> list[Step]:
        """Fresh steps for a new sequence, to be applied in this order."""
        return [make() for make in self._makers]

    @classmethod
    def parse(cls, spec: dict[str, Any] | None) -> DecoderPlan:
        """Read the ``decoder`` entry of a tokenizer.json.

        Raises:
            ArtifactError: it is of a kind that has no exact streaming form here.
        """
        if spec is None:
            return cls((JoinWithSpaces,))
        makers: list[Callable[[], Step]] = []
        fused = False
        for entry in _flatten(spec):
            maker, joins = _maker(entry, fused)
            makers.append(maker)
            fused = fused or joins
        return cls(tuple(makers))


def _flatten(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if spec["type"] != "Sequence":
        return [spec]
    return [entry for inner in spec["decoders"] for entry in _flatten(inner)]


def _maker(entry: dict[str, Any], fused: bool) -> tuple[Callable[[], Step], bool]:
    """Constructor of one step, and whether it joins tokens. ``fused``: an earlier step joined them already."""
    match entry:
        case {"type": "Fuse"}:
            return Fuse, True
        case {"type": "ByteLevel"} if not fused:
            return ByteLevel, True
        case {"type": "ByteFallback"} if not fused:
            return ByteFallback, False
        # In joined text a longer pattern could straddle two pieces.
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old and (
            not fused or len(old) == 1
        ):
            return lambda: Replace(old, new), False
        case {"type": "Metaspace", "replacement": str(replacement)} if not fused:
            drop = entry.get("prepend_scheme", "always") != "never"
            return lambda: Metaspace(replacement, drop), False
        case {"type": "Strip", "content": str(content), "start": int(start), "stop": int(stop)}:
            if not fused:
                return lambda: StripEach(content, start, stop), False
            if stop == 0:
                return lambda: StripStart(content, start), False
    raise ArtifactError(
        f"decoder step {entry} cannot be streamed{' after a step that joins tokens' if fused else ''}; expected "
        "ByteLevel, or Replace, Strip, Metaspace, ByteFallback and Fuse"
    )
