"""What helps a small drafter: equal short trainings on the same text, one after the other.

    python export/recipes/smollm2/ablate.py --verifier DIR --model smollm2-135m --corpus DIR --out DIR

Resumable: a variant that is finished is not trained again. Writes ablations.md and ablations.png into --out.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from dspark_export.figures import figure_panels
from dspark_export.training.checkpoint import CHECKPOINT_FILE
from dspark_export.training.corpus_settings import CorpusSettings
from dspark_export.training.corpus_source import SOURCE_FILE
from dspark_export.training.run import TrainingRun
from dspark_export.training.settings import TrainSettings
from dspark_export.training.shard import load_shard
from dspark_export.training.status import Status

logger = logging.getLogger("ablate")

BASE: dict[str, Any] = {
    "draft_vocab": 8192,
    "target_layer_ids": (1, 8, 14, 20, 27),
    "ema": 0.98,
    "warmup_steps": 20,
    "evaluate_minutes": 1e6,
}
"""Of every variant, unless it says otherwise."""


@dataclass(frozen=True)
class Variant:
    """One short training: what is different from the base."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("base"),
    Variant("layers from random", {"init_layers": "random"}),
    Variant("Markov head from random", {"init_markov": "random"}),
    Variant("taps 1, 8, 14, 20, 28", {"target_layer_ids": (1, 8, 14, 20, 28)}),
    Variant("all six taps", {"target_layer_ids": None}),
    Variant("taps 8, 20, 28", {"target_layer_ids": (8, 20, 28)}),
    Variant("tap 28 alone", {"target_layer_ids": (28,)}),
    Variant("block 4", {"block_size": 4}),
    Variant("block 7", {"block_size": 7}),
    Variant("draft vocabulary 16384", {"draft_vocab": 16384}),
    Variant("1 layer", {"layers": 1}),
    Variant("3 layers", {"layers": 3}),
    Variant("cross entropy to the text only", {"ce_weight": 1.0, "l1_weight": 0.0, "distribution_weight": 0.0}),
    Variant("L1 only", {"ce_weight": 0.0, "l1_weight": 1.0, "distribution_weight": 0.0}),
    Variant("cross entropy to the text and L1", {"distribution_weight": 0.0}),
    Variant("cross entropy to the distribution only", {"ce_weight": 0.0, "l1_weight": 0.0}),
    Variant("equal slot weights", {"position_decay": 1e6}),
    Variant("gated head", {"head": "gated"}),
    Variant("rnn head", {"head": "rnn"}),
    Variant("rank 128", {"rank": 128}),
    Variant("Muon", {"optimiser": "muon"}),
    Variant("learning rate 0.001", {"learning_rate": 1e-3}),
    Variant("learning rate 0.006", {"learning_rate": 6e-3}),
    Variant("draft vocabulary full", {"draft_vocab": None}),
)


@dataclass(frozen=True)
class Result:
    """What a variant reached."""

    name: str
    steps: int
    seconds: float
    """Of one processor, measuring included."""
    accepted_length: float
    by_domain: dict[str, float]
    stands: list[float]
    """Conditional acceptance of each draft."""

    @property
    def gain_per_hour(self) -> float:
        """Accepted drafts a round for each hour of one processor."""
        return (self.accepted_length - 1.0) / (self.seconds / 3600)


@dataclass(frozen=True)
class Text:
    """The shards that all variants are trained on."""

    folder: Path
    shards: int
    tokens: int
    dialogues: int

    @classmethod
    def fixed(cls, corpus: Path, folder: Path, shards: int) -> Text:
        """The first shards of a corpus that may still grow, linked into a folder of their own."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [SOURCE_FILE]
        names += [f"shard-{index:05d}.{kind}" for index in range(shards + 1) for kind in ("npz", "safetensors")]
        for name in names:
            link = folder / name
            if not link.exists():
                link.symlink_to((corpus / name).resolve(strict=True))
        loaded = [load_shard(folder / f"shard-{index + 1:05d}.npz") for index in range(shards)]
        tokens = sum(dialogue.answer_length for shard in loaded for dialogue in shard)
        return cls(folder, shards, tokens, sum(map(len, loaded)))


@dataclass(frozen=True)
class Ablation:
    """Where and how long variants are trained."""

    verifier: Path
    model: str
    text: Text
    out: Path
    steps: int
    threads: int

    def run(self, variant: Variant) -> Result:
        """Train one, or read what it reached before."""
        folder = self.out / variant.name.replace(" ", "-").replace(",", "")
        stored = folder / "result.json"
        if stored.is_file():
            return Result(**json.loads(stored.read_text(encoding="utf-8")))
        # One that was interrupted begins anew: its time is part of the result.
        (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        given = {**BASE, **variant.changes}
        per_step = given.get("dialogues_per_step", 16)
        passes = max(1, -(-self.steps * per_step // self.text.dialogues))
        tokens = int(self.steps * per_step / self.text.dialogues * self.text.tokens / passes)
        settings = TrainSettings(
            CorpusSettings(self.verifier, threads=self.threads),
            self.model,
            folder,
            corpus=self.text.folder,
            tokens=max(1, tokens),
            passes=passes,
            first_shards=self.text.shards,
            **given,
        )
        began = time.process_time()

        def show(status: Status) -> None:
            logger.info("%s: %s, step %d", variant.name, status.what, status.position.step)

        report = TrainingRun(settings, lambda: False, show).run(resume=False)
        held_out = report.held_out
        result = Result(
            variant.name,
            report.position.step,
            time.process_time() - began,
            held_out.accepted_length,
            dict(held_out.by_domain),
            list(held_out.conditional),
        )
        (folder / CHECKPOINT_FILE).unlink()
        stored.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
        return result


def table(results: Sequence[Result], text: Text) -> str:
    """Markdown."""
    domains = sorted({domain for result in results for domain in result.by_domain})
    lines = [
        f"{results[0].steps} steps each on the same {text.dialogues} dialogues ({text.tokens} answer tokens); minutes "
        "of one processor, measuring included. Greedy, bonus token included.",
        "",
        f"| variant | minutes | accepted length | {' | '.join(domains)} | drafts 1-4 stand | drafts a round per hour |",
        f"|{'---|' * (5 + len(domains))}",
    ]
    for result in results:
        by_domain = " | ".join(f"{result.by_domain.get(domain, float('nan')):.2f}" for domain in domains)
        stands = " ".join(f".{round(100 * value):02d}" for value in result.stands[:4])
        lines.append(
            f"| {result.name} | {result.seconds / 60:.1f} | {result.accepted_length:.3f} | {by_domain} | {stands} | "
            f"{result.gain_per_hour:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(png: Path, results: Sequence[Result]) -> None:
    """Accepted length and gain an hour, a bar a variant."""
    with figure_panels(png, (10.0, 0.3 * len(results) + 1.2), 1, 2) as [[left, right]]:
        names = [result.name for result in results][::-1]
        left.barh(names, [result.accepted_length - 1.0 for result in results][::-1], left=1.0)
        left.set(xlabel="held-out accepted length (greedy)")
        right.barh(names, [result.gain_per_hour for result in results][::-1], color="tab:orange")
        right.set(xlabel="accepted drafts a round per hour of one processor", yticklabels=[])
        for axes in (left, right):
            axes.grid(alpha=0.3, axis="x")


def main(
    verifier: Annotated[Path, typer.Option(help="Artifact directory of the verifier.")],
    corpus: Annotated[Path, typer.Option(help="Folder that dspark-export corpus wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    model: Annotated[str, typer.Option(help="What the verifier was exported from.")] = "smollm2-135m",
    shards: Annotated[int, typer.Option(help="Shards to train on.")] = 4,
    steps: Annotated[int, typer.Option(help="Of each variant.")] = 250,
    threads: Annotated[int, typer.Option(help="0 takes one a core.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Name of a variant; may be repeated. Default all.")] = None,
) -> None:
    """Train the variants and write the table after each."""
    if unknown := set(only or ()) - {variant.name for variant in VARIANTS}:
        raise typer.BadParameter(f"expected names of variants, got {', '.join(sorted(unknown))}", param_hint="--only")
    logging.basicConfig(level=logging.WARNING)
    ablation = Ablation(verifier, model, Text.fixed(corpus, out / "corpus", shards), out, steps, threads)
    results: list[Result] = []
    for variant in VARIANTS:
        if only and variant.name not in only:
            continue
        results.append(ablation.run(variant))
        typer.echo(f"{variant.name}: {results[-1].accepted_length:.3f}")
        (out / "ablations.md").write_text(table(results, ablation.text), encoding="utf-8")
        draw(out / "ablations.png", results)


if __name__ == "__main__":
    typer.run(main)
