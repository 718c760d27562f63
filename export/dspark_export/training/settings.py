"""What a training run is made of: one dataclass, every field an option of ``dspark-export train``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dspark_export.drafter_spec import HeadKind
from dspark_export.errors import ExportError
from dspark_export.training.checks import check_options
from dspark_export.training.corpus_settings import CorpusSettings
from dspark_export.training.schedule import Schedule
from dspark_export.verifier import STORED

MarkovStart = Literal["bigram", "random"]
LayerStart = Literal["random", "target"]
Precision = Literal["auto", "float32", "bfloat16"]
OptimiserKind = Literal["adamw", "muon"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "head": ("vanilla", "gated", "rnn"),
    "init_markov": ("bigram", "random"),
    "init_layers": ("random", "target"),
    "precision": ("auto", "float32", "bfloat16"),
    "optimiser": ("adamw", "muon"),
    "schedule": ("cosine", "wsd"),
    "dtype": STORED,
}


@dataclass(frozen=True)
class TrainSettings:
    """Raises ExportError for a value out of range; the message names the option."""

    text: CorpusSettings
    model: str
    """The checkpoint that the verifier was exported from: RoPE, heads and MLP size come from it."""
    out: Path
    corpus: Path | None = None
    """Folder of the text; another process may write it. None keeps it in ``out``."""
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
    target_layer_ids: tuple[int, ...] | None = None
    """Of the layers that the verifier was exported with, those whose outputs the drafter reads; None reads all."""
    init_from: Path | None = None
    """A drafter in the released layout to go on from, instead of first weights; read at the first step alone."""
    init_markov: MarkovStart = "bigram"
    init_layers: LayerStart = "target"
    optimiser: OptimiserKind = "adamw"
    muon_rate: float = 1.0
    """Learning rate of Muon as a multiple of AdamW's."""
    muon_iterations: int = 5
    learning_rate: float = 3e-3
    schedule: Schedule = "cosine"
    decay_share: float = 0.2
    """Last part of the budget, in which the learning rate of ``wsd`` falls."""
    warmup_steps: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    dialogues_per_step: int = 16
    anchors: int = 32
    """Most blocks of a dialogue in one step."""
    passes: int = 3
    """How often a dialogue is trained on while text is made as fast as it is used: once when it is new, then mixed with
    younger ones. More often where another process makes it more slowly."""
    first_shards: int = 2
    """Shards that must be there before the first step: draft vocabulary and bigrams are counted in them."""
    ce_weight: float = 0.1
    l1_weight: float = 0.9
    confidence_weight: float = 1.0
    distribution_weight: float = 1.0
    """Of the cross entropy to the target's distribution."""
    position_decay: float = 4.0
    """Slot k weighs exp(-k / position_decay)."""
    dtype: str = "bfloat16"
    """Storage of the written drafter."""
    precision: Precision = "auto"
    """Of the products while training; auto measures which is faster here, once: a resumed run keeps what it has."""
    checkpoint_minutes: float = 5.0
    evaluate_minutes: float = 5.0

    def __post_init__(self) -> None:
        check = check_options(self)
        if self.hours is not None and self.tokens is not None:
            raise ExportError("--hours and --tokens: expected one of them, got both")
        check("hours", self.hours is None or self.hours > 0, "more than 0")
        check("tokens", self.tokens is None or self.tokens > 0, "more than 0")
        check("block_size", 1 <= self.block_size <= 64, "1 to 64")
        check("draft_vocab", self.draft_vocab is None or self.draft_vocab >= 2, "at least 2")
        check("rank", self.rank >= 2, "at least 2")
        check("intermediate_size", self.intermediate_size is None or self.intermediate_size >= 1, "at least 1")
        check("muon_iterations", 1 <= self.muon_iterations < 100, "1 to 99")
        check("target_layer_ids", self.target_layer_ids is None or len(self.target_layer_ids) > 0, "at least one")
        check("learning_rate", 0 < self.learning_rate < 1, "a number between 0 and 1")
        check("ema", 0 <= self.ema < 1, "a number from 0 up to 1")
        check("decay_share", 0 < self.decay_share <= 1, "more than 0, at most 1")
        for option, choices in _CHOICES.items():
            check(option, getattr(self, option) in choices, f"one of {', '.join(choices)}")
        for option in ("layers", "dialogues_per_step", "anchors", "passes", "first_shards"):
            check(option, getattr(self, option) >= 1, "at least 1")
        for option in ("clip", "position_decay", "muon_rate"):
            check(option, getattr(self, option) > 0, "more than 0")
        for option in ("warmup_steps", "weight_decay", "checkpoint_minutes", "evaluate_minutes"):
            check(option, getattr(self, option) >= 0, "0 or more")
        for option in ("ce_weight", "l1_weight", "confidence_weight", "distribution_weight"):
            check(option, getattr(self, option) >= 0, "0 or more")

    @property
    def corpus_folder(self) -> Path:
        return self.corpus or self.out / "corpus"

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it continues. Budget, schedule and text may change."""
        names = (
            "block_size", "layers", "rank", "head", "draft_vocab", "intermediate_size", "target_layer_ids",
            "init_markov", "init_layers", "optimiser", "muon_rate", "muon_iterations", "learning_rate", "warmup_steps",
            "weight_decay", "clip", "ema", "dialogues_per_step", "anchors", "passes", "first_shards", "ce_weight",
            "l1_weight", "confidence_weight", "distribution_weight", "position_decay",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        taps = self.target_layer_ids
        return values | {"target_layer_ids": None if taps is None else list(taps), "seed": self.text.seed}
