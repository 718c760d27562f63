"""Text of a growing token sequence, piece by piece: no broken characters, no lost spaces."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_backend.tokenizer import Tokenizer

# Tokens of the prompt that can still matter to what follows: a character has at most four bytes, the rest is margin for
# special tokens in between and for runs of byte tokens.
_PROMPT_TAIL = 64


class IncrementalDetokenizer:
    """One sequence's text. All pieces and ``finish()`` together equal ``tokenizer.decode`` of all ids, however split.

    A token costs about a microsecond, whatever the length. Text is held back only while a later token could change it:
    an incomplete UTF-8 character and, with byte-fallback vocabularies, a run of byte tokens until it ends (the decoder
    shows every byte of a run as U+FFFD if any part of it is invalid).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._steps = tokenizer.decoder_plan.steps()

    def prime(self, prompt_ids: Sequence[int]) -> None:
        """Make the text continue a prompt; call it before the first push.

        The first word then keeps its leading space, and bytes that end the prompt in the middle of a character count:
        that character comes out with the token that completes it. Whole characters of the prompt never come out.
        """
        if prompt_ids:
            for step in self._steps:
                step.start_midway()
            self.push(prompt_ids[-_PROMPT_TAIL:])
            for step in self._steps:
                step.end_prompt()

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became final with these tokens; maybe empty."""
        pieces = []
        for token_id in token_ids:
            token = self._tokenizer.token(token_id)
            if token is not None and not (self._skip_special and self._tokenizer.is_special(token)):
                pieces.append(token)
        for step in self._steps:
            pieces = step.push(pieces)
        return "".join(pieces)

    def finish(self) -> str:
        """What was held back: incomplete bytes become U+FFFD. The last call."""
        pieces: list[str] = []
        for step in self._steps:
            pieces = step.push(pieces) + step.finish()
        return "".join(pieces)
