"""The speculating engine on the test's own thread, over real artifacts and a cost model of the test's choosing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines import Driver

from dspark_backend.calibration import Calibration, load_calibration
from dspark_backend.cost import CostModel, StepCurve
from dspark_backend.cost_cache import CostCache
from dspark_backend.engine import Engine
from dspark_backend.preparation import Preparer
from dspark_backend.scheduling import parse_policy
from dspark_backend.speculation import Drafting
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter
from dspark_backend.telemetry import RoundRecord

POLICIES = ("off", "fixed:1", "fixed:3", "fixed:64", "threshold:0.2", "causal", "lagged")

CHEAP = CostModel(
    verify=(StepCurve(1, 128, (1, 2), (1.0, 1.01)), StepCurve(16, 128, (1, 2), (1.0, 1.16))),
    draft=(StepCurve(1, 128, (1,), (0.01,)), StepCurve(16, 128, (1,), (0.01,))),
)
"""Verifying costs next to nothing a token: the adaptive policies draft and verify deep."""

DEAR = CostModel(
    verify=(StepCurve(1, 128, (1, 2), (1.0, 2.0)), StepCurve(16, 128, (1, 2), (16.0, 32.0))),
    draft=(StepCurve(1, 128, (1,), (1.0,)), StepCurve(16, 128, (1,), (16.0,))),
)
"""A token more costs as much as a step: speculation cannot pay."""


class SpeculatingDriver(Driver):
    """A driver whose engine has a drafter; ``records`` keeps every round. ``calibrated``: by the artifact's own."""

    def __init__(
        self,
        verifier: Path,
        drafter: Path,
        cost: CostModel = CHEAP,
        policy: str = "causal",
        cost_cache: CostCache | None = None,
        calibrated: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(verifier, **settings)
        self.records: list[RoundRecord] = []
        self.drafter = OnnxRuntimeDrafter(drafter, verifier, self.config.threads)
        artifact = self.drafter.artifact
        calibration = (
            load_calibration(drafter, artifact.block_size, artifact.source_hash)
            if calibrated
            else Calibration.identity(artifact.block_size)
        )
        drafting = Drafting(self.drafter, calibration, cost, cost_cache)
        self.engine = Engine(self.stage, self.tokenizer, self.config, drafting, self.records.append)
        self.preparer = Preparer(
            self.stage.artifact,
            self.tokenizer,
            self.engine.cache.max_context,
            self.config.max_slots,
            self.config.default_max_tokens,
            default_policy=parse_policy(policy),
        )
