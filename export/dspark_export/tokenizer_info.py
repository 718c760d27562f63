"""What a model's metadata says about its tokenizer, beside tokenizer.json."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizerInfo:
    """Special tokens and chat template of a model."""

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Every token that ends an answer, in ascending order; may be empty."""
    add_bos: bool | None
    """Raw text gets BOS in front (True), nothing (False), or what tokenizer.json's post-processor says (None)."""
    chat_template: str | None
    """Jinja source."""
    bos_token: str | None
    eos_token: str | None
    """The tokens as text, for the chat template. ``eos_token`` is the main one."""
