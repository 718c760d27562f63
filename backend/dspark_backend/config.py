"""The engine's settings: one dataclass, read from the ``parameters`` of config.pbtxt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dspark_backend.errors import ConfigError
from dspark_backend.scheduling import DepthPolicy, parse_policy
from dspark_backend.stages.settings import PROVIDERS, StageSettings


def _parse(key: str, kind: str, text: str, base: Path) -> Any:
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
    except ValueError:
        wanted = "an integer" if kind == "int" else "a number"
        raise ConfigError(f"{key}: expected {wanted}, got {text!r}") from None
    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{key}: expected true or false, got {text!r}")
        return text.lower() == "true"
    if kind in ("Path", "Path | None"):
        if not text:
            raise ConfigError(f"{key}: expected a path, got an empty string")
        return (base / text).resolve()
    return text


@dataclass(frozen=True)
class EngineConfig:
    """Settings of the ``dspark`` model. Every field is a parameter of config.pbtxt under the same name.

    Raises:
        ConfigError: a value is out of range; the message names the key.
    """

    verifier: Path
    """Artifact directory of the verifier; relative paths start at the model's own folder."""
    drafter: Path | None = None
    """Artifact directory of the drafter; none serves without speculation."""
    policy: str = ""
    """How deep drafts are verified: off, fixed:N, threshold:P, causal or lagged. Default: causal with a drafter, off
    without."""
    cost_cache: Path | None = None
    """Where measured step times are kept; default the cache folder of the user."""
    profile_seconds: float = 20.0
    """Most time to measure step times at the first load."""
    max_slots: int = 16
    """Most sequences in the key/value cache at once."""
    kv_budget_mib: int = 2048
    """Memory for keys and values; what fits is admitted, the rest waits."""
    max_context: int = 0
    """Most tokens of a sequence, prompt included; 0 takes the artifact's (less where the budget is smaller)."""
    max_queue_size: int = 256
    """Requests that may wait for a slot; more are refused as UNAVAILABLE."""
    default_max_tokens: int = 256
    """For requests that do not say."""
    prefill_chunk: int = 256
    """Prompt tokens a step while nothing streams."""
    prefill_chunk_busy: int = 64
    """Prompt tokens a step for each prompt that waits while others stream, up to prefill_chunk in all: more starts a
    request sooner, less keeps the others even."""
    prefix_reuse: bool = True
    """Start from cached rows of an earlier prompt with the same beginning."""
    max_prompt_bytes: int = 0
    """Longest text_input or messages; 0 takes 16 bytes for each token of the context."""
    threads: int = 0
    """Threads of the CPU runtime, of which no more work than a layer has key heads; 0 takes one a core."""
    provider: str = ""
    """What ONNX Runtime runs on: cpu, cuda, or tensorrt (compiles at the first load). Default: cpu. TensorRT engines do
    not read it."""
    device: int = 0
    """Number of the GPU, where one is used."""
    engine_cache: Path | None = None
    """Where the provider tensorrt keeps what it compiled; default: its own choice, the working directory."""
    metrics_interval_ms: int = 500
    """Between two publications of the metrics."""

    def __post_init__(self) -> None:
        def check(key: str, good: bool, wanted: str) -> None:
            if not good:
                raise ConfigError(f"{key}: expected {wanted}, got {getattr(self, key)!r}")

        check("profile_seconds", 1.0 <= self.profile_seconds <= 3600.0, "1 to 3600")
        if self.depth_policy.drafts and self.drafter is None:
            raise ConfigError(f"policy: expected off without a drafter, got {self.policy!r}; set the key drafter, too")
        check("max_slots", 1 <= self.max_slots <= 1024, "1 to 1024")
        check("kv_budget_mib", self.kv_budget_mib >= 1, "at least 1")
        check("max_context", self.max_context == 0 or self.max_context >= 2, "0 or at least 2")
        check("max_queue_size", self.max_queue_size >= 1, "at least 1")
        check("default_max_tokens", self.default_max_tokens >= 1, "at least 1")
        check("prefill_chunk", 1 <= self.prefill_chunk <= 65536, "1 to 65536")
        check("prefill_chunk_busy", 1 <= self.prefill_chunk_busy <= 65536, "1 to 65536")
        check("max_prompt_bytes", self.max_prompt_bytes >= 0, "0 or more")
        check("threads", 0 <= self.threads <= 1024, "0 to 1024")
        check("provider", self.provider in ("", *PROVIDERS), " or ".join(PROVIDERS))
        check("device", 0 <= self.device <= 255, "0 to 255")
        check("metrics_interval_ms", 10 <= self.metrics_interval_ms <= 2000, "10 to 2000")

    @property
    def depth_policy(self) -> DepthPolicy:
        """``policy``, parsed. Raises ConfigError where it names none."""
        try:
            return parse_policy(self.policy or ("off" if self.drafter is None else "causal"))
        except ValueError as error:
            raise ConfigError(f"policy: {error}") from None

    @property
    def stages(self) -> StageSettings:
        """What of it the stages read."""
        return StageSettings(self.threads, self.provider, self.device, self.engine_cache)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], base: Path) -> EngineConfig:
        """Settings from config.pbtxt's strings; ``base`` is the model's folder.

        Raises:
            ConfigError: an unknown key, a value of the wrong type or range, or no ``verifier``.
        """
        kinds = {field.name: str(field.type) for field in fields(cls)}
        unknown = sorted(parameters.keys() - kinds.keys())
        if unknown:
            raise ConfigError(f"{unknown[0]}: unknown parameter; expected one of {', '.join(sorted(kinds))}")
        if "verifier" not in parameters:
            raise ConfigError("verifier: expected the artifact directory of the verifier, got nothing")
        return cls(**{key: _parse(key, kinds[key], text.strip(), base) for key, text in parameters.items()})
