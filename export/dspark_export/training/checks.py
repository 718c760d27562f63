"""One message for every option that is out of range."""

from __future__ import annotations

from collections.abc import Callable

from dspark_export.errors import ExportError


def check_options(settings: object) -> Callable[[str, bool, str], None]:
    """A function (field, whether it is good, what was expected) that raises ExportError where it is not."""

    def check(option: str, good: bool, wanted: str) -> None:
        if not good:
            raise ExportError(
                f"--{option.replace('_', '-')}: expected {wanted}, got {getattr(settings, option)!r}"
            )  # fmt: skip

    return check
