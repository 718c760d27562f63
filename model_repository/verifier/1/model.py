"""The ``verifier`` model: scores prompts with the target alone. All logic is in dspark_backend."""

from dspark_backend.triton_stages import VerifierModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
