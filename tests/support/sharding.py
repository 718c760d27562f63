"""Safetensors checkpoints in several shards with an index, as Hugging Face writes large ones."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.numpy import load_file, save_file


def split(folder: Path, shards: int) -> list[Path]:
    """Split a folder's model.safetensors into ``shards`` files and write the index; returns the files."""
    single = folder / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    files = []
    for index in range(shards):
        name = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in names[index::shards]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
        files.append(folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files
