"""How a shard is written: prompts from files and from the target itself, and the target's answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from dspark_export.errors import ExportError
from dspark_export.training.corpus_settings import CorpusSettings
from dspark_export.training.generate import Draw, Generator
from dspark_export.training.openings import Opening, OpeningChoice, alternating, read_openings
from dspark_export.training.record import TargetRecord
from dspark_export.training.shard import Dialogue
from dspark_export.training.user_turns import Prompt, UserTurns

logger = logging.getLogger(__name__)

_SHORTEST_ANSWER = 4
_ATTEMPTS = 12
_FUTILE_ATTEMPTS = 3

Progress = Callable[[str, float], None]


class DialogueWriter:
    """Writes shards; what is in one depends on the settings, its number and the prompts that were used before."""

    def __init__(self, turns: UserTurns, generator: Generator, settings: CorpusSettings) -> None:
        self._turns = turns
        self._generator = generator
        self._settings = settings
        self._from_files = self._read_files(settings.prompts)
        openings: list[Opening] = [opening for path in settings.openings for opening in read_openings(path)]
        self._openings = OpeningChoice(openings)

    def _read_files(self, paths: Sequence[Path]) -> list[Prompt]:
        prompts = list({prompt.key: prompt for path in paths for prompt in self._turns.from_file(path)}.values())
        order = np.random.default_rng([self._settings.seed, 1]).permutation(len(prompts))
        return [prompts[index] for index in order]

    def write(
        self, number: int, used: Collection[int], stop: Callable[[], bool], progress: Progress
    ) -> tuple[list[Dialogue], list[TargetRecord]]:
        """The dialogues of shard ``number`` (0 is held out) and what the target said along them.

        ``used``: keys of prompts that may not be taken again.

        Raises:
            Stopped: ``stop`` said so.
            ExportError: the target writes no usable text.
        """
        settings, held_out = self._settings, number == 0
        what = "held-out text" if held_out else f"shard {number}"
        random = np.random.default_rng([settings.seed, 2, number])
        each = settings.answers_per_prompt if settings.sampled_share and not held_out else 1
        count = math.ceil((settings.held_out if held_out else settings.shard_size) / each)
        prompts = self._filed_prompts(number, count, used)
        taken = {*used, *(prompt.key for prompt in prompts)}
        prompts += self._own_prompts(
            count - len(prompts), taken, random, held_out, stop, lambda done: progress(what, 0.4 * done)
        )
        if not prompts:
            raise ExportError(
                "the target wrote no usable prompt; give some with --prompts, or allow longer ones with --prompt-tokens"
            )
        share = 0.0 if held_out else settings.sampled_share
        asked = [prompt for prompt in prompts for _ in range(each)]
        # Of one prompt at most the first answer is greedy: a second one would be the same.
        cold = random.random(len(prompts)) < (1 - share) * each
        sampled = [index > 0 or not first for first in cold.tolist() for index in range(each)]
        draws = [
            Draw(prompt.token_ids, settings.answer_tokens, float(hot), int(random.integers(2**32)))
            for prompt, hot in zip(asked, sampled, strict=True)
        ]
        answers = self._generator.draw(draws, stop, lambda done: progress(what, 0.4 + 0.6 * done), record=True)
        dialogues, records = [], []
        for prompt, hot, answer in zip(asked, sampled, answers, strict=True):
            if len(answer.token_ids) < _SHORTEST_ANSWER or answer.record is None:
                continue
            tokens = np.array([*prompt.token_ids, *answer.token_ids], dtype=np.int32)
            dialogues.append(Dialogue(tokens, len(prompt.token_ids), hot, prompt.key, prompt.domain))
            records.append(answer.record)
        if not dialogues:
            raise ExportError(f"{what}: every answer ended within {_SHORTEST_ANSWER} tokens; give other --prompts")
        return dialogues, records

    def _filed_prompts(self, number: int, count: int, used: Collection[int]) -> list[Prompt]:
        """Half of a shard while the files last; each shard has its own part of them."""
        half, held = math.ceil(count / 2), math.ceil(self._settings.held_out / 2)
        first = 0 if number == 0 else held + (number - 1) * half
        unseen = {
            prompt.key: prompt for prompt in self._from_files[first : first + half] if prompt.key not in used
        }  # fmt: skip
        return list(unseen.values())

    def _own_prompts(
        self,
        count: int,
        taken: Collection[int],
        random: np.random.Generator,
        held_out: bool,
        stop: Callable[[], bool],
        progress: Callable[[float], None],
    ) -> list[Prompt]:
        """Up to ``count`` prompts that the target wrote, none taken before."""
        found: dict[int, Prompt] = {}
        domains = self._openings.domains
        for attempt in range(_ATTEMPTS):
            missing = count - len(found)
            if missing <= 0 or (attempt >= _FUTILE_ATTEMPTS and not found):
                break
            chosen, draws = [], []
            have = [prompt.domain for prompt in found.values()]
            for domain in alternating(domains, have, math.ceil(1.25 * missing)):
                chosen.append(self._openings.draw(random, domain, held_out))
                draws.append(
                    Draw(
                        self._turns.opening(random, chosen[-1]),
                        self._turns.opening_tokens(random),
                        self._settings.prompt_temperature,
                        int(random.integers(2**32)),
                    )
                )
            before = len(found)
            written = self._generator.draw(
                draws,
                stop,
                lambda done, before=before, missing=missing: progress((before + done * missing) / count),  # type: ignore[misc]
            )
            for opening, draw, turn in zip(chosen, draws, written, strict=True):
                prompt = self._turns.from_target(draw.token_ids, opening, turn)
                if prompt is not None and prompt.key not in taken:
                    found.setdefault(prompt.key, prompt)
        if len(found) < count:
            logger.warning("the target wrote %d usable prompts of %d wanted", len(found), count)
        by_domain = [[prompt for prompt in found.values() if prompt.domain == domain] for domain in domains]
        in_turn = [prompt for row in zip_longest(*by_domain) for prompt in row if prompt is not None]
        return in_turn[:count]
