"""The dialogues of a run on disk, made when they are first asked for, by this process or by another one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dspark_backend.stages.artifact import VerifierArtifact
from dspark_export.training.corpus_settings import CorpusSettings
from dspark_export.training.corpus_source import check_source
from dspark_export.training.dialogues import DialogueWriter, Progress
from dspark_export.training.features import TargetPass
from dspark_export.training.folder_lock import FolderLock
from dspark_export.training.record import TargetRecord
from dspark_export.training.record_file import RecordFile, save_records
from dspark_export.training.shard import Dialogue, load_shard, save_shard

logger = logging.getLogger(__name__)

HELD_OUT = 0
"""Number of the shard that is never trained on."""


class Corpus:
    """Shards 0, 1, 2, ... of dialogues, no prompt twice, and what the target says along them.

    Whoever holds the folder's lock writes; others read what is there. A shard that is made depends on the settings and
    on those before it.
    """

    def __init__(
        self,
        directory: Path,
        artifact: VerifierArtifact,
        writer: DialogueWriter,
        target: TargetPass,
        settings: CorpusSettings,
    ) -> None:
        """Raises ExportError where the folder holds text of another target."""
        directory.mkdir(parents=True, exist_ok=True)
        check_source(directory, artifact)
        self._directory = directory
        self._writer = writer
        self._target = target
        self._settings = settings
        self._feature_size = artifact.feature_size
        self._lock = FolderLock(directory / "writer.lock")
        self._shards: list[list[Dialogue]] = []
        self._records: dict[int, RecordFile] = {}
        self._seen: set[int] = set()

    def close(self) -> None:
        """Let others write."""
        self._lock.release()

    def _path(self, index: int, suffix: str = ".npz") -> Path:
        return self._directory / f"shard-{index:05d}{suffix}"

    @property
    def available(self) -> int:
        """Shards that are there, without a gap from the first."""
        count = len(self._shards)
        while self._path(count).is_file():
            count += 1
        return count

    def may_write(self) -> bool:
        """Whether missing shards are made here; false while another process makes them."""
        return self._lock.acquire()

    def shard(self, index: int, stop: Callable[[], bool], progress: Progress) -> list[Dialogue]:
        """The dialogues of a shard; what is missing of it and of those before is generated, or waited for, now.

        Raises:
            Stopped: ``stop`` said so meanwhile; nothing of an unfinished shard is kept.
            ExportError: the target writes no usable text, or a file is damaged.
        """
        while len(self._shards) <= index:
            number = len(self._shards)
            path = self._path(number)
            if not path.is_file() and self._lock.wait(path.is_file, stop, partial(progress, f"shard {number}", 0.0)):
                dialogues, records = self._writer.write(number, self._seen, stop, progress)
                if self._settings.feature_cache:
                    save_records(self._path(number, ".safetensors"), records)
                # Last: whoever sees it finds the records, too.
                save_shard(path, dialogues)
            dialogues = load_shard(path)
            self._seen.update(dialogue.key for dialogue in dialogues)
            self._shards.append(dialogues)
        return self._shards[index]

    def record(self, shard: int, row: int) -> TargetRecord:
        """What the target says along a dialogue of a shard that was asked for before: read, or computed now."""
        dialogues = self._shards[shard]
        if not self._settings.feature_cache:
            return self._target.record(dialogues[row])
        if shard not in self._records:
            path = self._path(shard, ".safetensors")
            if not path.is_file():
                logger.info("shard %d: the target's pass is made up for", shard)
                save_records(path, [self._target.record(dialogue) for dialogue in dialogues])
            self._records[shard] = RecordFile(path, dialogues, self._feature_size)
        return self._records[shard].read(row)
