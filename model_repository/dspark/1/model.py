"""The ``dspark`` model: streams completions. All logic is in dspark_backend."""

from dspark_backend.triton_adapter import DSparkModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
