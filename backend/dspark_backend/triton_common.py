"""What all models share of Triton's Python API: errors -> codes, parameters, folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from dspark_backend.errors import DSparkError, Status

# Names, not values: the stub fills pb_utils with its classes only after it imported the model.
_CODES = {
    Status.INVALID_ARGUMENT: "INVALID_ARG",
    Status.UNAVAILABLE: "UNAVAILABLE",
    # Triton has no code for a deadline; the message's prefix tells the client.
    Status.DEADLINE_EXCEEDED: "CANCELLED",
    Status.CANCELLED: "CANCELLED",
    Status.INTERNAL: "INTERNAL",
}


_TRITONS_OWN = frozenset({"EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS", "TRITON_AUTO_COMPLETE_CONFIG"})


_LONGEST_MESSAGE = 2000
"""Characters: messages quote what came, and that may be megabytes."""


def triton_error(error: DSparkError) -> Any:
    """Triton's error of ours: the code, and a message that starts with the status in brackets."""
    code = getattr(pb_utils.TritonError, _CODES[error.status])
    text = str(error)
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[:_LONGEST_MESSAGE]}..."
    return pb_utils.TritonError(f"[{error.status.value}] {text}", code)


def read_parameters(args: dict[str, str]) -> dict[str, str]:
    """The ``parameters`` of config.pbtxt, but for those of Triton's own Python backend."""
    parameters = json.loads(args["model_config"]).get("parameters", {})
    return {key: entry["string_value"] for key, entry in parameters.items() if key not in _TRITONS_OWN}


def model_folder(args: dict[str, str]) -> Path:
    """The folder of the model version that is being loaded: where relative paths start."""
    return Path(args["model_repository"]) / args["model_version"]
