"""What a training run is made of: one dataclass, every field an option of ``dspark-export train``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dspark_export.drafter_spec import HeadKind
from dspark_export.errors import ExportError
from dspark_export.verifier import DTYPES

MarkovStart = Literal["bigram", "random"]
LayerStart = Literal["random", "target"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainSettings:
    """Raises ExportError for a value out of range; the message names the option."""

    verifier: Path
    model: str
    """The checkpoint that the verifier was exported from: RoPE, heads and MLP size come from it."""
    out: Path
    prompts: tuple[Path, ...] = ()
    hours: float | None = None
    tokens: int | None = None
    """Tokens of answers to train on; each is seen ``passes`` times."""
    block_size: int = 5
    layers: int = 2
    rank: int = 64
    head: HeadKind = "vanilla"
    draft_vocab: int | None = None
    """None can propose every token of the target."""
    intermediate_size: int | None = None
    """None takes the target's."""
    init_markov: MarkovStart = "bigram"
    init_layers: LayerStart = "random"
    seed: int = 0
    threads: int = 0
    """0 takes one a core."""
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    dialogues_per_step: int = 4
    anchors: int = 128
    """Most blocks of a dialogue in one step. The target's pass over it costs the same for few as for many."""
    passes: int = 3
    """How often a dialogue is trained on: once when it is new, then mixed with younger ones."""
    shard_size: int = 64
    """Dialogues generated at a time."""
    first_shards: int = 2
    """Shards that must be there before the first step: draft vocabulary and bigrams are counted in them."""
    held_out: int = 24
    """Dialogues, answered greedily, that only measure."""
    answer_tokens: int = 192
    prompt_tokens: int = 160
    """Longer prompts are left out."""
    sampled_share: float = 0.5
    """Part of the answers that is drawn at temperature 1; the rest is greedy."""
    answers_per_prompt: int = 2
    """A prompt of the target's own costs as much time as an answer. At most one of them is greedy."""
    slots: int = 16
    """Answers generated at once."""
    ce_weight: float = 0.1
    l1_weight: float = 0.9
    confidence_weight: float = 1.0
    position_decay: float = 4.0
    """Slot k weighs exp(-k / position_decay)."""
    dtype: str = "bfloat16"
    """Storage of the written drafter."""
    precision: Precision = "auto"
    """Of the products while training; auto measures which is faster here."""
    checkpoint_minutes: float = 5.0
    evaluate_minutes: float = 5.0

    def __post_init__(self) -> None:
        def check(option: str, good: bool, wanted: str) -> None:
            if not good:
                raise ExportError(f"--{option.replace('_', '-')}: expected {wanted}, got {getattr(self, option)!r}")

        if self.hours is not None and self.tokens is not None:
            raise ExportError("--hours and --tokens: expected one of them, got both")
        check("hours", self.hours is None or self.hours > 0, "more than 0")
        check("tokens", self.tokens is None or self.tokens > 0, "more than 0")
        check("block_size", 1 <= self.block_size <= 64, "1 to 64")
        check("head", self.head in ("vanilla", "gated", "rnn"), "vanilla, gated or rnn")
        check("draft_vocab", self.draft_vocab is None or self.draft_vocab >= 2, "at least 2")
        check("rank", self.rank >= 2, "at least 2")
        check("init_markov", self.init_markov in ("bigram", "random"), "bigram or random")
        check("init_layers", self.init_layers in ("random", "target"), "random or target")
        check("precision", self.precision in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16")
        check("dtype", self.dtype in DTYPES, ", ".join(DTYPES))
        check("learning_rate", 0 < self.learning_rate < 1, "a number between 0 and 1")
        check("ema", 0 <= self.ema < 1, "a number from 0 up to 1")
        check("sampled_share", 0 <= self.sampled_share <= 1, "0 to 1")
        check("seed", 0 <= self.seed < 2**32, "an unsigned 32-bit integer")
        check("answer_tokens", self.answer_tokens >= 4, "at least 4")
        for option in ("layers", "dialogues_per_step", "anchors", "passes", "shard_size", "first_shards", "held_out"):
            check(option, getattr(self, option) >= 1, "at least 1")
        for option in ("slots", "prompt_tokens", "answers_per_prompt"):
            check(option, getattr(self, option) >= 1, "at least 1")
        for option in ("clip", "position_decay"):
            check(option, getattr(self, option) > 0, "more than 0")
        for option in ("threads", "warmup_steps", "weight_decay", "checkpoint_minutes", "evaluate_minutes"):
            check(option, getattr(self, option) >= 0, "0 or more")

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it continues."""
        names = (
            "block_size", "layers", "rank", "head", "draft_vocab", "intermediate_size", "seed", "learning_rate",
            "warmup_steps", "weight_decay", "clip", "ema", "dialogues_per_step", "anchors", "passes", "shard_size",
            "first_shards", "held_out", "answer_tokens", "prompt_tokens", "sampled_share", "answers_per_prompt",
            "ce_weight", "l1_weight", "confidence_weight", "position_decay", "init_markov", "init_layers",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}
