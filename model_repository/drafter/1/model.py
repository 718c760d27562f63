"""The ``drafter`` model: drafts one block with the drafter alone. All logic is in dspark_backend."""

from dspark_backend.triton_stages import DrafterModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
