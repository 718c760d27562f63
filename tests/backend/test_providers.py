"""What runs an artifact: providers that are not there are named at load, and a runtime that nobody has, too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from drafters import export_golden_drafter

from dspark_backend.config import EngineConfig
from dspark_backend.errors import ArtifactError, ConfigError
from dspark_backend.runner import EngineRunner
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_backend.stages.providers import check_available, check_started, load_libraries, session_providers
from dspark_backend.stages.registry import open_drafter, open_verifier
from dspark_backend.stages.settings import StageSettings

NAME = "qwen3_vanilla"
CPU_ALONE = ["CPUExecutionProvider"]
GPU_BUILD = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_an_engine_on_a_provider_that_is_not_installed(golden_artifacts, provider):
    config = EngineConfig(verifier=golden_artifacts[NAME], provider=provider)
    with pytest.raises(ConfigError, match=rf"provider: expected {provider}, .*pip install 'dspark-triton\[gpu\]'"):
        EngineRunner.open(config)


def test_a_process_ends_with_the_message(golden_artifacts):
    program = (
        "import sys; from pathlib import Path\n"
        "from dspark_backend.config import EngineConfig\n"
        "from dspark_backend.runner import EngineRunner\n"
        "EngineRunner.open(EngineConfig(verifier=Path(sys.argv[1]), provider='cuda'))\n"
    )
    command = [sys.executable, "-c", program, str(golden_artifacts[NAME])]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0 and "ConfigError: provider: expected cuda" in ended.stderr


def test_a_provider_that_was_not_built_in():
    check_available("cpu", CPU_ALONE)
    check_available("tensorrt", GPU_BUILD)
    with pytest.raises(ConfigError, match="has only CPUExecutionProvider; uninstall onnxruntime"):
        check_available("cuda", CPU_ALONE)


def test_a_provider_that_did_not_start():
    check_started("cuda", GPU_BUILD[1:])
    with pytest.raises(ConfigError, match=r"expected cuda, but it did not start .*CUDA 13 and cuDNN 9"):
        check_started("cuda", CPU_ALONE)
    with pytest.raises(ConfigError, match=r"expected tensorrt, .*TensorRT 10"):
        check_started("tensorrt", GPU_BUILD[1:])


def test_libraries_are_loaded_where_the_runtime_can():
    asked = []
    load_libraries(SimpleNamespace(preload_dlls=lambda: asked.append("all")))
    load_libraries(SimpleNamespace())
    assert asked == ["all"]


def test_what_a_session_is_asked_for():
    class Stream:
        stream = 77

    assert session_providers(StageSettings(), None) == CPU_ALONE
    cuda = ("CUDAExecutionProvider", {"device_id": "1", "user_compute_stream": "77"})
    assert session_providers(StageSettings(provider="cuda", device=1), Stream()) == [cuda]
    first, second = session_providers(StageSettings(0, "tensorrt", 1, Path("/engines")), Stream())
    assert first[0] == "TensorrtExecutionProvider" and second == cuda
    assert first[1]["trt_engine_cache_enable"] == "1" and first[1]["trt_engine_cache_path"] == "/engines"
    assert first[1]["user_compute_stream"] == "77"


def change_runtime(folder: Path, out: Path, runtime: str) -> Path:
    """The artifact of another folder, but for the runtime that it names."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).symlink_to(file)
    stage = json.loads((folder / "stage.json").read_text()) | {"runtime": runtime}
    (out / "stage.json").unlink()
    (out / "stage.json").write_text(json.dumps(stage))
    return out


@pytest.fixture(scope="module")
def drafter(golden_artifacts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("registry") / "drafter"
    export_golden_drafter(NAME, golden_artifacts[NAME], folder)
    return folder


class TestRegistry:
    """The runtime comes from the artifact."""

    def test_onnxruntime(self, golden_artifacts, drafter):
        verifier = open_verifier(golden_artifacts[NAME], StageSettings(threads=1))
        assert isinstance(verifier, OnnxRuntimeVerifier)
        verifier.close()
        open_drafter(drafter, golden_artifacts[NAME], StageSettings(threads=1)).close()

    def test_an_unknown_runtime(self, golden_artifacts, tmp_path):
        folder = change_runtime(golden_artifacts[NAME], tmp_path / "v", "tflite")
        with pytest.raises(ArtifactError, match=r"expected an artifact for onnxruntime or tensorrt, got .*'tflite'"):
            open_verifier(folder, StageSettings())

    def test_drafter_and_verifier_of_two_runtimes(self, golden_artifacts, drafter, tmp_path):
        folder = change_runtime(golden_artifacts[NAME], tmp_path / "v", "tensorrt")
        with pytest.raises(ArtifactError, match=r"expected a drafter for tensorrt, .* for onnxruntime; export both"):
            open_drafter(drafter, folder, StageSettings())

    def test_tensorrt_needs_no_onnxruntime(self):
        program = (
            "import sys; sys.modules['onnxruntime'] = None\n"
            "import dspark_backend.runner, dspark_backend.stages.tensorrt_verifier\n"
            "import dspark_backend.stages.tensorrt_drafter, dspark_backend.scoring, dspark_backend.drafting_alone\n"
        )
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
