"""Lays the repository that the server loads: the dspark model of the image, with this release's parameters.

Weights are not copied: the parameters name the folders of the artifacts. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

COMPLETE = "stage.json"


def with_parameters(config: str, parameters: dict[str, str]) -> str:
    """The text of a config.pbtxt in which each of ``parameters`` stands once, whatever stood there before."""
    lines = [line for line in config.splitlines() if _key(line) not in parameters]
    for key, value in parameters.items():
        lines.append(f"parameters: {{ key: {json.dumps(key)}, value: {{ string_value: {json.dumps(value)} }} }}")
    return "\n".join(lines) + "\n"


def _key(line: str) -> str | None:
    found = re.match(r'\s*parameters:?\s*\{\s*key:\s*"([^"]+)"', line)
    return found.group(1) if found else None


def lay(template: Path, out: Path, artifacts: Path, parameters: dict[str, str], drafter: bool) -> None:
    """Write ``out``/dspark.

    Raises:
        FileNotFoundError: the template has no dspark model, or an artifact is not there; the message says which.
    """
    stages = ("verifier", "drafter") if drafter else ("verifier",)
    for name in stages:
        if not (artifacts / name / "1" / COMPLETE).is_file():
            raise FileNotFoundError(
                f"{artifacts / name / '1'}: expected an artifact with {COMPLETE}, found none; see "
                "modelRepository.source in the values of the chart, or set modelRepository.drafter=false"
            )
    source = template / "dspark"
    if not (source / "config.pbtxt").is_file():
        raise FileNotFoundError(f"{source}: expected the dspark model, found no config.pbtxt; see imagePath")
    shutil.rmtree(out / "dspark", ignore_errors=True)
    (out / "dspark" / "1").mkdir(parents=True)
    shutil.copyfile(source / "1" / "model.py", out / "dspark" / "1" / "model.py")
    places = {name: str(artifacts / name / "1") for name in stages}
    config = (source / "config.pbtxt").read_text(encoding="utf-8")
    if not drafter:
        config = "\n".join(line for line in config.splitlines() if _key(line) != "drafter")
    (out / "dspark" / "config.pbtxt").write_text(with_parameters(config, parameters | places), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("template", "out", "artifacts", "parameters"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--drafter", action="store_true")
    given = parser.parse_args(arguments)
    try:
        parameters = json.loads(given.parameters.read_text(encoding="utf-8"))
        lay(given.template, given.out, given.artifacts, parameters, given.drafter)
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
