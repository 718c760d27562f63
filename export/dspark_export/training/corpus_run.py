"""A corpus written by a process of its own, shard after shard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dspark_backend.stages.artifact import VerifierArtifact, load_verifier_artifact
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export.errors import ExportError
from dspark_export.training.corpus import Corpus
from dspark_export.training.corpus_settings import CorpusSettings
from dspark_export.training.dialogues import DialogueWriter
from dspark_export.training.features import TargetPass
from dspark_export.training.generate import Generator
from dspark_export.training.user_turns import UserTurns


@dataclass(frozen=True)
class ShardReport:
    """A shard that was written."""

    number: int
    dialogues: int
    answer_tokens: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"shard {self.number}: {self.dialogues} dialogues, {self.answer_tokens} answer tokens, "
            f"{self.seconds:.0f} s, {self.answer_tokens / max(self.seconds, 1e-9):.0f} tokens/s"
        )


@dataclass(frozen=True)
class OpenCorpus:
    """A corpus, and the engines behind it, which start when they are first needed."""

    corpus: Corpus
    generator: Generator
    target: TargetPass

    @classmethod
    def at(cls, directory: Path, artifact: VerifierArtifact, settings: CorpusSettings) -> OpenCorpus:
        """Raises ExportError where the settings do not fit the target, or the folder is of another."""
        turns = UserTurns(settings.verifier, artifact, settings.prompt_tokens)
        longest = turns.longest + settings.answer_tokens
        if longest > artifact.max_context:
            raise ExportError(
                f"--prompt-tokens and --answer-tokens: with the chat template they make {longest} tokens, the verifier "
                f"takes {artifact.max_context}; give less"
            )
        generator = Generator(settings.verifier, longest, settings.slots, settings.threads)
        target = TargetPass(lambda: OnnxRuntimeVerifier(settings.verifier, settings.threads))
        writer = DialogueWriter(turns, generator, settings)
        return cls(Corpus(directory, artifact, writer, target, settings), generator, target)

    def close(self) -> None:
        """End the engines, and let others write."""
        self.generator.close()
        self.target.close()
        self.corpus.close()


class CorpusRun:
    """Writes missing shards. ``stop`` is asked while text is generated."""

    def __init__(self, directory: Path, settings: CorpusSettings, stop: Callable[[], bool]) -> None:
        """Raises ExportError where another process writes this corpus."""
        self._stop = stop
        self._open = OpenCorpus.at(directory, load_verifier_artifact(settings.verifier), settings)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if not self._open.corpus.may_write():
            self._open.close()
            raise ExportError(f"--out {directory}: another process writes this corpus; let it end first")

    def shards(self, count: int | None) -> Iterator[ShardReport]:
        """Write shards until there are ``count``, the held-out one not counted; without end where that is None.

        Raises:
            Stopped: it was asked to stop; whole shards are kept.
        """
        corpus = self._open.corpus
        number = corpus.available
        while count is None or number <= count:
            begin = time.monotonic()
            dialogues = corpus.shard(number, self._stop, lambda what, done: None)
            tokens = sum(dialogue.answer_length for dialogue in dialogues)
            yield ShardReport(number, len(dialogues), tokens, time.monotonic() - begin)
            number += 1

    def close(self) -> None:
        """End the engine, and let others write."""
        self._open.close()
