"""ONNX Runtime's execution providers: which a session gets, and whether they really started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnxruntime as ort

from dspark_backend.errors import ConfigError
from dspark_backend.stages.cuda.device import Device
from dspark_backend.stages.settings import StageSettings

_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_NEEDS = {
    "cuda": "NVIDIA's driver and the libraries of CUDA 13 and cuDNN 9",
    "tensorrt": "NVIDIA's driver and the libraries of CUDA 13, cuDNN 9 and TensorRT 10",
}


def session_providers(settings: StageSettings, device: Device | None) -> list[Any]:
    """The ``providers`` argument of a session; ``device`` is the one whose stream the session shall use."""
    if not settings.on_device:
        return [_NAMES["cpu"]]
    shared: dict[str, str] = {"device_id": str(settings.device)}
    if device is not None:
        # Copies that a stage enqueues and the session's kernels must not overtake each other.
        shared["user_compute_stream"] = str(device.stream)
    providers: list[Any] = [(_NAMES["cuda"], shared)]
    if settings.provider == "tensorrt":
        options = shared | {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}
        if settings.engine_cache is not None:
            options["trt_engine_cache_path"] = options["trt_timing_cache_path"] = str(settings.engine_cache)
        # What TensorRT does not take runs on CUDA.
        providers.insert(0, (_NAMES["tensorrt"], options))
    return providers


def load_libraries(runtime: Any = ort) -> None:
    """Load CUDA and cuDNN from the wheels that the gpu extra brings along, else from where the system has them."""
    # Such wheels are on no path that the loader knows. Releases before 1.21 cannot do it.
    if hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()


def check_available(provider: str, available: Sequence[str] | None = None) -> None:
    """Make sure that the installed ONNX Runtime was built with a provider.

    Raises:
        ConfigError: it was not; the message names the extra to install.
    """
    found = list(ort.get_available_providers() if available is None else available)
    if _NAMES[provider] not in found:
        raise ConfigError(
            f"provider: expected {provider}, but the installed onnxruntime {ort.__version__} has only "
            f"{', '.join(found)}; uninstall onnxruntime and install the gpu extra instead: "
            "pip install 'dspark-triton[gpu]'"
        )


def check_started(provider: str, started: Sequence[str]) -> None:
    """Make sure that a session runs on what was asked: ONNX Runtime falls back to the CPU without an error.

    Raises:
        ConfigError: the provider did not start; the message names what it needs.
    """
    if _NAMES[provider] not in started:
        raise ConfigError(
            f"provider: expected {provider}, but it did not start (the session has {', '.join(started)}); it needs "
            f"{_NEEDS[provider]}: see ONNX Runtime's lines above, or set provider to cpu"
        )
