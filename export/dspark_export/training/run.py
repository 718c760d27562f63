"""A whole run: text is generated and trained on in turns, measured, and kept on disk at every moment."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dspark_backend.stages.artifact import VerifierArtifact, load_verifier_artifact
from dspark_backend.stages.batch import FloatArray
from dspark_export.errors import ExportError
from dspark_export.torch_drafter import TorchDrafter
from dspark_export.training.batch import Example
from dspark_export.training.beginning import check_beginning, continued_drafter, first_drafter, scale_of
from dspark_export.training.checkpoint import (
    CHECKPOINT_FILE,
    Checkpoint,
    Position,
    check_identity,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from dspark_export.training.corpus import HELD_OUT, Corpus
from dspark_export.training.corpus_run import OpenCorpus
from dspark_export.training.curves import (
    HELD_OUT_FILE,
    STEP_COLUMNS,
    STEPS_FILE,
    Curve,
    draw_curves,
    held_out_columns,
)
from dspark_export.training.export import (
    drafter_config,
    feature_columns,
    open_target,
    pick_mask_token,
    released_state,
    spec_of,
    write_checkpoint_folder,
)
from dspark_export.training.folder_lock import FolderLock
from dspark_export.training.generate import Stopped
from dspark_export.training.heldout import HeldOut, HeldOutReport
from dspark_export.training.rounds import Rounds
from dspark_export.training.schedule import learning_rate
from dspark_export.training.settings import TrainSettings
from dspark_export.training.shard import Dialogue
from dspark_export.training.statistics import count_tokens
from dspark_export.training.status import RunReport, Status
from dspark_export.training.trainer import StepReport, Trainer, faster_precision

logger = logging.getLogger(__name__)

LOCK_FILE = "train.lock"
_DEFAULT_HOURS = 1.0


class TrainingRun:
    """One sitting of a run. ``stop`` is asked after steps and while text is generated; ``show`` gets the status."""

    def __init__(self, settings: TrainSettings, stop: Callable[[], bool], show: Callable[[Status], None]) -> None:
        self._settings = settings
        self._stop = stop
        self._show = show
        self._last: StepReport | None = None
        self._held_report: HeldOutReport | None = None

    def run(self, resume: bool) -> RunReport:
        """Train until the budget is used up or ``stop`` says so.

        Raises:
            ExportError: the options do not fit the target, ``out`` holds a run and ``resume`` is not set, or another
                process trains there.
            Stopped: it was asked to stop before the first step; text that was generated is kept.
        """
        settings = self._settings
        artifact = load_verifier_artifact(settings.text.verifier)
        settings.out.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(settings.out / LOCK_FILE)
        # Before the checkpoint is read: one that still ends may be about to write it.
        if not lock.acquire():
            raise ExportError(f"--out {settings.out}: another process trains in this folder; let it end first")
        try:
            return self._run(artifact, self._stored_run(resume, artifact))
        finally:
            lock.release()

    def _run(self, artifact: VerifierArtifact, stored: Checkpoint | None) -> RunReport:
        text = self._settings.text
        before = torch.get_num_threads()
        torch.set_num_threads(text.threads or len(os.sched_getaffinity(0)))
        opened = OpenCorpus.at(self._settings.corpus_folder, artifact, text)
        try:
            self._begin(artifact, stored, opened.corpus)
            return self._loop()
        finally:
            opened.close()
            torch.set_num_threads(before)

    def _stored_run(self, resume: bool, artifact: VerifierArtifact) -> Checkpoint | None:
        path = self._settings.out / CHECKPOINT_FILE
        if not path.is_file():
            return None
        if not resume:
            raise ExportError(
                f"--out {self._settings.out}: it holds a run; continue it with --resume, or choose another"
            )
        stored = load_checkpoint(path)
        check_identity(stored.identity, self._settings.identity(), artifact.source_hash)
        if self._settings.precision not in ("auto", stored.precision):
            raise ExportError(
                f"--resume: the run is trained with --precision {stored.precision}, now it is "
                f"{self._settings.precision}; give the same or auto, or train anew into another --out"
            )
        return stored

    def _begin(self, artifact: VerifierArtifact, stored: Checkpoint | None, corpus: Corpus) -> None:
        """Text to start with, the drafter, and all that a step needs."""
        settings = self._settings
        self._began = time.monotonic() - (stored.position.seconds if stored else 0.0)
        self._position = stored.position if stored else Position()
        self._corpus, self._verifier_hash = corpus, artifact.source_hash
        self._rounds = Rounds(corpus, self._shard, settings.passes, settings.text.seed)
        columns = feature_columns(artifact, settings)
        embedding = artifact.embedding.read(settings.text.verifier)
        shared = (_tensor(embedding), _tensor(artifact.head.read(settings.text.verifier)))
        if stored is None:
            # What cannot be trained is refused before text is generated for it.
            weights = open_target(settings.model, artifact)
            self._config = drafter_config(weights.config, artifact, settings, pick_mask_token(embedding))
            check_beginning(self._config, settings, weights)
        held_out = self._shard(HELD_OUT)
        if stored is None:
            first = [
                pair for index in range(settings.first_shards) for pair in self._rounds.shard(HELD_OUT + 1 + index)
            ]
            scale = scale_of(map(self._example, first), columns)
            torch.manual_seed(settings.text.seed)
            np.random.seed(settings.text.seed)
            random.seed(settings.text.seed)
            if settings.init_from is not None:
                drafter = continued_drafter(settings.init_from, shared, scale)
                self._config["mask_token_id"] = drafter.spec.mask_token_id
            else:
                self._tell("count tokens")
                statistics = count_tokens(map(self._example, first), artifact.vocab_size)
                drafter = first_drafter(self._config, settings, shared, statistics, scale, weights)
            precision = faster_precision() if settings.precision == "auto" else settings.precision
        else:
            self._config, precision = stored.config, stored.precision
            drafter = TorchDrafter(spec_of(self._config), *shared)
            drafter.feature_scale.copy_(stored.feature_scale)
            drafter.load_state_dict(stored.model)
        average = TorchDrafter(spec_of(self._config), *shared)
        average.feature_scale.copy_(drafter.feature_scale)
        average.load_state_dict(stored.average if stored else drafter.state_dict())
        self._trainer = Trainer(drafter, average.eval(), columns, settings, precision)
        self._precision = precision
        if stored is not None:
            self._trainer.optimisers.load_state_dict(stored.optimisers)
            restore_random_state(stored.random_state)
        step = self._position.step
        held = [self._example((HELD_OUT, row)) for row in range(len(held_out))]
        self._held_out = HeldOut(held, columns)
        self._steps = Curve(settings.out / STEPS_FILE, STEP_COLUMNS, step)
        names = held_out_columns(settings.block_size, self._held_out.domains)
        self._held_curve = Curve(settings.out / HELD_OUT_FILE, names, step)
        self._evaluate()

    def _loop(self) -> RunReport:
        settings = self._settings
        saved = measured = time.monotonic()
        while (progress := self._progress(self._position)) < 1.0 and not self._stop():
            try:
                self._step(progress)
            except Stopped:
                break
            now = time.monotonic()
            if now - measured >= 60 * settings.evaluate_minutes:
                self._evaluate()
                measured = now
            if now - saved >= 60 * settings.checkpoint_minutes:
                self._save()
                self._draw()
                saved = now
        finished = self._progress(self._position) >= 1.0
        # Whoever asked to stop may not wait for the measurement.
        self._save()
        report = self._evaluate()
        self._draw()
        return RunReport(self._position, report, finished)

    def _step(self, progress: float) -> None:
        settings = self._settings
        position = self._in_a_round()
        pairs = self._rounds.pairs(position)
        chosen = [
            self._example(pair) for pair in pairs[position.offset : position.offset + settings.dialogues_per_step]
        ]
        draws = np.random.default_rng([settings.text.seed, 4, position.step])
        rate = learning_rate(
            settings.learning_rate,
            position.step,
            settings.warmup_steps,
            progress,
            settings.schedule,
            settings.decay_share,
        )
        report = self._last = self._trainer.step(chosen, draws, rate, position.step)
        position = replace(
            position,
            step=position.step + 1,
            offset=position.offset + len(chosen),
            seen_tokens=position.seen_tokens + sum(example.dialogue.answer_length for example in chosen),
            seconds=time.monotonic() - self._began,
        )
        where = (position.step, position.seen_tokens, position.seconds)
        losses = (report.loss, report.ce, report.l1, report.confidence, report.matched)
        self._steps.add(*where, *losses, report.gradient_norm, rate)
        self._position = position
        self._tell("train")

    def _in_a_round(self) -> Position:
        """The position, with dialogues left: another round begins where one is done, for which text may be made now.

        Raises:
            Stopped: ``stop`` said so meanwhile; the position stays where it was.
        """
        position = self._position
        if position.shards:
            if position.offset < len(self._rounds.pairs(position)):
                return position
            position = replace(position, round=position.round + 1)
        self._position = self._rounds.next(position)
        return self._position

    def _example(self, pair: tuple[int, int]) -> Example:
        index, row = pair
        return Example(self._shard(index)[row], self._corpus.record(index, row))

    def _shard(self, index: int) -> list[Dialogue]:
        return self._corpus.shard(
            index, self._stop, lambda what, done: self._tell(f"generate {what}, {100 * done:.0f}%")
        )

    def _progress(self, position: Position) -> float:
        settings = self._settings
        if settings.tokens is not None:
            return position.seen_tokens / (settings.tokens * settings.passes)
        return position.seconds / (3600 * (settings.hours or _DEFAULT_HOURS))

    def _evaluate(self) -> HeldOutReport:
        """Measure the averaged weights; a point of the curve a step."""
        self._tell("measure")
        report = self._held_report = self._held_out.evaluate(self._trainer.average)
        position = self._position
        if position.step != self._held_curve.last_step:
            where = (position.step, position.seen_tokens, position.seconds)
            lengths = (length for _, length in report.by_domain)
            self._held_curve.add(*where, report.accepted_length, *report.conditional, *lengths)
        logger.info("step %d: held-out accepted length %.3f", self._position.step, report.accepted_length)
        return report

    def _save(self) -> None:
        """Checkpoint and drafter."""
        self._tell("save")
        settings, trainer = self._settings, self._trainer
        self._position = replace(self._position, seconds=time.monotonic() - self._began)
        save_checkpoint(
            settings.out / CHECKPOINT_FILE,
            Checkpoint(
                identity=settings.identity() | {"verifier_hash": self._verifier_hash},
                config=self._config,
                feature_scale=trainer.drafter.feature_scale,
                precision=self._precision,
                position=self._position,
                model=trainer.drafter.state_dict(),
                average=trainer.average.state_dict(),
                optimisers=trainer.optimisers.state_dict(),
                random_state=random_state(),
            ),
        )
        write_checkpoint_folder(settings.out, self._config, released_state(trainer.average), settings.dtype)

    def _draw(self) -> None:
        try:
            draw_curves(self._settings.out)
        except ExportError as error:
            logger.info("no picture of the curves: %s", error)

    def _tell(self, what: str) -> None:
        position = replace(self._position, seconds=time.monotonic() - self._began)
        self._show(Status(what, min(1.0, self._progress(position)), position, self._last, self._held_report))


def _tensor(array: FloatArray) -> Tensor:
    """A copy: a file that is mapped read-only is no place for a tensor."""
    return torch.from_numpy(np.array(array, dtype=np.float32))
