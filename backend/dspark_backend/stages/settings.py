"""How stages run, whatever their runtime. Imports none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROVIDERS = ("cpu", "cuda", "tensorrt")
"""What ONNX Runtime can run on."""


@dataclass(frozen=True)
class StageSettings:
    """How the stages of a process run. The fields are those of EngineConfig."""

    threads: int = 0
    provider: str = ""
    """cpu, cuda or tensorrt; empty takes cpu. For artifacts that ONNX Runtime runs."""
    device: int = 0
    engine_cache: Path | None = None

    @property
    def on_device(self) -> bool:
        return self.provider in ("cuda", "tensorrt")
