"""Whether a command line fits the project's console scripts: its commands and options exist."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib import import_module

import typer
from artifacts import CHECKOUT


def check_command(words: Sequence[str]) -> None:
    """Raises AssertionError where the script, a command or an option does not exist."""
    scripts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
    assert words[0] in scripts, f"{words[0]} is no console script"
    module = import_module(scripts[words[0]].partition(":")[0])
    command = typer.main.get_command(module.app)
    rest = list(words[1:])
    commands = getattr(command, "commands", {})
    if rest and rest[0] in commands:
        command = commands[rest.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest[: rest.index("--") if "--" in rest else None]:
        if word.startswith("-"):
            assert word.partition("=")[0] in known, f"{words[0]} has no option {word}; it has {sorted(known)}"
