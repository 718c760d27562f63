"""Layers on a command line."""

from __future__ import annotations

import typer


def layer_ids(text: str | None) -> tuple[int, ...] | None:
    """Layers such as ``1,8,14`` of ``--target-layer-ids``; None where there are none.

    Raises:
        BadParameter: the text is something else.
    """
    if not text:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"expected layers such as 1,8,14, got {text!r}", param_hint="--target-layer-ids"
        ) from None
