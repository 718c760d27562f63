"""Opens the stage that an artifact needs: its runtime is written in ``stage.json``, the rest in the settings.

A runtime is imported where it is used: each may be all that is installed.
"""

from __future__ import annotations

from pathlib import Path

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.artifact import load_drafter_artifact, load_verifier_artifact
from dspark_backend.stages.protocol import DrafterStage, VerifierStage
from dspark_backend.stages.settings import StageSettings

RUNTIMES = ("onnxruntime", "tensorrt")


def open_verifier(directory: Path, settings: StageSettings) -> VerifierStage:
    """The verifier in a directory, on the runtime it was exported for.

    Raises:
        ArtifactError: the artifact is missing, corrupt, or for a runtime that we do not have.
        ConfigError: what it runs on is not there.
    """
    runtime = _runtime(directory, load_verifier_artifact(directory, check_contents=False).runtime)
    if runtime == "tensorrt":
        from dspark_backend.stages.tensorrt_verifier import TensorRtVerifier

        return TensorRtVerifier(directory, settings)
    from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

    return OnnxRuntimeVerifier(directory, settings.threads, settings)


def open_drafter(directory: Path, verifier_directory: Path, settings: StageSettings) -> DrafterStage:
    """The drafter in a directory; embedding and LM head are the verifier's. Raises as ``open_verifier``."""
    runtime = _runtime(directory, load_drafter_artifact(directory, check_contents=False).runtime)
    verifier = load_verifier_artifact(verifier_directory, check_contents=False)
    if verifier.runtime != runtime:
        raise ArtifactError(
            f"{directory}: expected a drafter for {verifier.runtime}, as the verifier {verifier_directory} is, got one "
            f"for {runtime}; export both for the same runtime"
        )
    if runtime == "tensorrt":
        from dspark_backend.stages.tensorrt_drafter import TensorRtDrafter

        return TensorRtDrafter(directory, verifier_directory, settings)
    from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter

    return OnnxRuntimeDrafter(directory, verifier_directory, settings.threads, settings)


def _runtime(directory: Path, found: str) -> str:
    if found not in RUNTIMES:
        raise ArtifactError(
            f"{directory}: expected an artifact for {' or '.join(RUNTIMES)}, got one for {found!r}; export it again"
        )
    return found
