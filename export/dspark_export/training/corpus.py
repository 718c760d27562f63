"""The dialogues of a run, made when they are first asked for and kept on disk."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dspark_export.errors import ExportError
from dspark_export.training.generate import Draw, Generator
from dspark_export.training.settings import TrainSettings
from dspark_export.training.shard import Dialogue, load_shard, save_shard
from dspark_export.training.user_turns import Prompt, UserTurns

logger = logging.getLogger(__name__)

HELD_OUT = 0
"""Number of the shard that is never trained on."""
_SHORTEST_ANSWER = 4
_ATTEMPTS = 12
_FUTILE_ATTEMPTS = 3

Progress = Callable[[str, float], None]


class Corpus:
    """Shards 0, 1, 2, ... of dialogues, no prompt twice. What a shard holds depends on the seed and those before it."""

    def __init__(self, directory: Path, turns: UserTurns, generator: Generator, settings: TrainSettings) -> None:
        self._directory = directory
        self._turns = turns
        self._generator = generator
        self._settings = settings
        self._shards: list[list[Dialogue]] = []
        self._seen: set[int] = set()
        self._from_files = self._read_files(settings.prompts)
        directory.mkdir(parents=True, exist_ok=True)

    def _read_files(self, paths: Sequence[Path]) -> list[Prompt]:
        prompts = list({prompt.key: prompt for path in paths for prompt in self._turns.from_file(path)}.values())
        order = np.random.default_rng([self._settings.seed, 1]).permutation(len(prompts))
        return [prompts[index] for index in order]

    def shard(self, index: int, stop: Callable[[], bool], progress: Progress) -> list[Dialogue]:
        """The dialogues of a shard; what is missing of it and of those before is generated now.

        Raises:
            Stopped: ``stop`` said so while text was being generated; nothing of the unfinished shard is kept.
            ExportError: the target writes no usable text, or a file is damaged.
        """
        while len(self._shards) <= index:
            number = len(self._shards)
            path = self._directory / f"shard-{number:05d}.npz"
            if path.is_file():
                dialogues = load_shard(path)
            else:
                dialogues = self._generate(number, stop, progress)
                save_shard(path, dialogues)
            self._seen.update(dialogue.key for dialogue in dialogues)
            self._shards.append(dialogues)
        return self._shards[index]

    def _generate(self, number: int, stop: Callable[[], bool], progress: Progress) -> list[Dialogue]:
        settings = self._settings
        what = "held-out text" if number == HELD_OUT else f"shard {number}"
        random = np.random.default_rng([settings.seed, 2, number])
        each = settings.answers_per_prompt if settings.sampled_share and number != HELD_OUT else 1
        count = math.ceil((settings.held_out if number == HELD_OUT else settings.shard_size) / each)
        prompts = self._filed_prompts(number, count)
        prompts += self._own_prompts(
            count - len(prompts),
            {prompt.key for prompt in prompts},
            random,
            stop,
            lambda done: progress(what, 0.4 * done),
        )
        if not prompts:
            raise ExportError(
                "the target wrote no usable prompt; give some with --prompts, or allow longer ones with --prompt-tokens"
            )
        share = 0.0 if number == HELD_OUT else settings.sampled_share
        asked = [prompt for prompt in prompts for _ in range(each)]
        # Of one prompt at most the first answer is greedy: a second one would be the same.
        cold = random.random(len(prompts)) < (1 - share) * each
        sampled = [index > 0 or not first for first in cold.tolist() for index in range(each)]
        draws = [
            Draw(prompt.token_ids, settings.answer_tokens, float(hot), int(random.integers(2**32)))
            for prompt, hot in zip(asked, sampled, strict=True)
        ]
        answers = self._generator.draw(draws, stop, lambda done: progress(what, 0.4 + 0.6 * done))
        dialogues = [
            Dialogue(
                np.array([*prompt.token_ids, *answer.token_ids], dtype=np.int32), len(prompt.token_ids), hot, prompt.key
            )
            for prompt, hot, answer in zip(asked, sampled, answers, strict=True)
            if len(answer.token_ids) >= _SHORTEST_ANSWER
        ]
        if not dialogues:
            raise ExportError(f"{what}: every answer ended within {_SHORTEST_ANSWER} tokens; give other --prompts")
        return dialogues

    def _filed_prompts(self, number: int, count: int) -> list[Prompt]:
        """Half of a shard while the files last; each shard has its own part of them."""
        half, held = math.ceil(count / 2), math.ceil(self._settings.held_out / 2)
        first = 0 if number == HELD_OUT else held + (number - 1) * half
        unseen = {
            prompt.key: prompt for prompt in self._from_files[first : first + half] if prompt.key not in self._seen
        }
        return list(unseen.values())

    def _own_prompts(
        self,
        count: int,
        taken: set[int],
        random: np.random.Generator,
        stop: Callable[[], bool],
        progress: Callable[[float], None],
    ) -> list[Prompt]:
        """Up to ``count`` prompts that the target wrote at temperature 1, none seen before."""
        found: dict[int, Prompt] = {}
        for attempt in range(_ATTEMPTS):
            missing = count - len(found)
            if missing <= 0 or (attempt >= _FUTILE_ATTEMPTS and not found):
                break
            draws = [
                Draw(
                    self._turns.opening(random),
                    self._turns.opening_tokens(random),
                    1.0,
                    int(random.integers(2**32)),
                )
                for _ in range(math.ceil(1.25 * missing))
            ]
            before = len(found)
            written = self._generator.draw(
                draws,
                stop,
                lambda done, before=before, missing=missing: progress((before + done * missing) / count),  # type: ignore[misc]
            )
            for draw, turn in zip(draws, written, strict=True):
                prompt = self._turns.from_target(draw.token_ids, turn)
                if prompt is not None and prompt.key not in self._seen and prompt.key not in taken:
                    found.setdefault(prompt.key, prompt)
        if len(found) < count:
            logger.warning("the target wrote %d usable prompts of %d wanted", len(found), count)
        return list(found.values())[:count]
