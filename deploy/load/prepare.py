"""Make or find environment and artifacts, then hand over to ``python -m dspark_load``. Standard library only."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "quickstart")]

import environment  # noqa: E402
import quickstart  # noqa: E402
import repository  # noqa: E402
from console import QuickstartError, say  # noqa: E402
from dspark_load import options  # noqa: E402
from locks import exclusive, share  # noqa: E402

EXTRAS = ("backend", "serve", "export", "plot")


def artifacts(venv: environment.Environment, cache: Path) -> list[str]:
    """Options that name the quickstart's artifacts, exported where they are not there yet."""
    command, log = [str(venv.script("dspark-export"))], cache / "export.log"
    salt = environment.fingerprint(quickstart.EXTRAS)  # the same packages: the quickstart's own exports serve as well
    verifier = repository.export(command, repository.served_verifier(), salt, cache, log)
    drafter = repository.export(command, repository.served_drafter(verifier), salt, cache, log)
    return ["--verifier", str(verifier), "--drafter", str(drafter), "--served", quickstart.SERVED]


def hand_over(given: list[str]) -> NoReturn:
    """Prepare, and become the load test.

    Raises:
        QuickstartError: the environment or the artifacts cannot be made.
    """
    module, given = ("dspark_load.genai_perf", given[1:]) if given[:1] == ["genai-perf"] else ("dspark_load", given)
    own = module != "dspark_load" or any(
        argument.partition("=")[0] in ("--url", "--verifier", "--drafter") for argument in given
    )
    if module == "dspark_load":
        options.parse(given if own else [*given, "--verifier", ".", "--drafter", "."])  # wrong options end it here
    cache = quickstart.cache_folder()
    key = environment.fingerprint(EXTRAS)
    venv = environment.Environment(cache / "load" / f"venv-{key}", key)
    if not venv.complete:
        say(f"  {quickstart.FIRST_START}")
    venv.folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(cache / "prepare.lock"):
        environment.prepare(venv, EXTRAS, venv.folder.parent / "install.log")
        used = share(venv.folder.with_suffix(".lock"))
        environment.prune(venv.folder.parent, venv)
        defaults = [] if own else artifacts(venv, cache)
    os.set_inheritable(used.fileno(), True)
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", ""))))
    command = [str(venv.python), "-m", module, "--cache", str(cache), *defaults, *given]
    os.execve(command[0], command, os.environ | {"PYTHONPATH": path})


def main() -> int:
    try:
        hand_over(sys.argv[1:])
    except (QuickstartError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
