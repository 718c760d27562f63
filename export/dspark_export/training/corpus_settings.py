"""What a corpus is made of: one dataclass, every field an option of ``dspark-export corpus`` and ``train``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dspark_export.training.checks import check_options


@dataclass(frozen=True)
class CorpusSettings:
    """Raises ExportError for a value out of range; the message names the option.

    A corpus may be continued with other settings, and with the same target in another precision: shards that are there
    stay as they are.
    """

    verifier: Path
    prompts: tuple[Path, ...] = ()
    openings: tuple[Path, ...] = ()
    """Beginnings of user turns, one a line, which the target completes."""
    feature_cache: bool = True
    """Keep on disk what the target said along each dialogue. Without, it is run again at every visit."""
    seed: int = 0
    threads: int = 0
    """0 takes one a core."""
    shard_size: int = 256
    """Dialogues generated at a time."""
    held_out: int = 48
    """Dialogues, answered greedily, that only measure."""
    answer_tokens: int = 192
    prompt_tokens: int = 160
    """Longer prompts are left out."""
    prompt_temperature: float = 1.0
    """At which the target writes prompts."""
    sampled_share: float = 0.5
    """Part of the answers that is drawn at temperature 1; the rest is greedy."""
    answers_per_prompt: int = 2
    """A prompt of the target's own costs as much time as an answer. At most one of them is greedy."""
    slots: int = 64
    """Answers generated at once."""

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> CorpusSettings:
        """Of a command's options, which may be more than these. Lists of files may be None."""
        values = {field.name: given[field.name] for field in fields(cls)}
        return cls(**values | {name: tuple(given[name] or ()) for name in ("prompts", "openings")})

    def __post_init__(self) -> None:
        check = check_options(self)
        check("sampled_share", 0 <= self.sampled_share <= 1, "0 to 1")
        check("prompt_temperature", 0 < self.prompt_temperature <= 2, "more than 0, at most 2")
        check("seed", 0 <= self.seed < 2**32, "an unsigned 32-bit integer")
        check("answer_tokens", self.answer_tokens >= 4, "at least 4")
        check("slots", 1 <= self.slots <= 1024, "1 to 1024")
        for option in ("shard_size", "held_out", "prompt_tokens", "answers_per_prompt"):
            check(option, getattr(self, option) >= 1, "at least 1")
        check("threads", self.threads >= 0, "0 or more")
