"""The stages as Triton models of their own: ``verifier`` scores a prompt, ``drafter`` drafts one block.

For timing a stage and for scoring with it; ``dspark`` opens the same artifacts in its own process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from dspark_backend.drafting_alone import draft_alone, parse_query
from dspark_backend.errors import ConfigError, DSparkError, InternalError
from dspark_backend.scoring import score
from dspark_backend.stages.registry import open_drafter, open_verifier
from dspark_backend.stages.settings import PROVIDERS, StageSettings
from dspark_backend.triton_common import model_folder, read_parameters, triton_error

logger = logging.getLogger(__name__)

_STAGE_KEYS = ("threads", "provider", "device", "engine_cache")


class VerifierModel:
    """``TritonPythonModel`` of the ``verifier`` model: scores a prompt, without the engine."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artifact beside the model's file, or where the parameter ``artifact`` says."""
        try:
            parameters = _Parameters(args, ("artifact", *_STAGE_KEYS))
            self._stage = open_verifier(parameters.folder("artifact", "."), parameters.settings())
        except DSparkError as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def execute(self, requests: list[Any]) -> list[Any]:
        """Score one prompt a request."""
        return [_answer(request, self._score) for request in requests]

    def finalize(self) -> None:
        self._stage.close()

    def _score(self, request: Any) -> list[Any]:
        token_ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy().reshape(-1).tolist()
        result = score(self._stage, token_ids, "logits" in request.requested_output_names())
        tensors = [
            pb_utils.Tensor("argmax", result.argmax.astype("int32")),
            pb_utils.Tensor("log_probs", result.log_probs.astype("float32")),
        ]
        if result.logits is not None:
            tensors.append(pb_utils.Tensor("logits", result.logits))
        return tensors


class DrafterModel:
    """``TritonPythonModel`` of the ``drafter`` model: drafts one block behind given features, without the engine."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artifact beside the model's file or at ``artifact``, and the one at ``verifier`` that it needs."""
        try:
            parameters = _Parameters(args, ("artifact", "verifier", *_STAGE_KEYS))
            self._stage = open_drafter(
                parameters.folder("artifact", "."),
                parameters.folder("verifier", "../../verifier/1"),
                parameters.settings(),
            )
        except DSparkError as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def execute(self, requests: list[Any]) -> list[Any]:
        """Draft one block a request."""
        return [_answer(request, self._draft) for request in requests]

    def finalize(self) -> None:
        self._stage.close()

    def _draft(self, request: Any) -> list[Any]:
        arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        result = draft_alone(self._stage, parse_query(arrays))
        return [
            pb_utils.Tensor("tokens", result.tokens.astype("int32")),
            pb_utils.Tensor("confidence", result.confidence.astype("float32")),
            pb_utils.Tensor("candidates", result.candidates.astype("int32")),
            pb_utils.Tensor("probabilities", result.probabilities),
        ]


class _Parameters:
    """The settings of a stage model. Raises ConfigError for a key that it does not have."""

    def __init__(self, args: dict[str, str], known: tuple[str, ...]) -> None:
        self._values = read_parameters(args)
        self._base = model_folder(args)
        unknown = sorted(self._values.keys() - set(known))
        if unknown:
            wanted = f"{', '.join(known[:-1])} or {known[-1]}"
            raise ConfigError(f"{unknown[0]}: unknown parameter; expected {wanted}")

    def folder(self, key: str, default: str) -> Path:
        return (self._base / self._values.get(key, default)).resolve()

    def settings(self) -> StageSettings:
        """Raises ConfigError where a number is no count, or the provider unknown."""
        provider = self._values.get("provider", "")
        if provider not in ("", *PROVIDERS):
            raise ConfigError(f"provider: expected {' or '.join(PROVIDERS)}, got {provider!r}")
        cache = self.folder("engine_cache", ".") if "engine_cache" in self._values else None
        return StageSettings(self._count("threads"), provider, self._count("device"), cache)

    def _count(self, key: str) -> int:
        text = self._values.get(key, "0")
        if not text.isdecimal():
            raise ConfigError(f"{key}: expected 0 or more, got {text!r}")
        return int(text)


def _answer(request: Any, run: Callable[[Any], list[Any]]) -> Any:
    try:
        return pb_utils.InferenceResponse(run(request))
    except DSparkError as error:
        return pb_utils.InferenceResponse(error=triton_error(error))
    except Exception:  # a defect must cost this request alone
        logger.exception("a request failed")
        defect = InternalError("internal error; the server's log has the details")
        return pb_utils.InferenceResponse(error=triton_error(defect))
