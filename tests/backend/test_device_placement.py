"""Stages whose cache, logits and features live in device memory answer as those in host memory do, to the last bit.

The device is one of host memory, so that ONNX Runtime's CPU provider binds the very addresses that a GPU would get.
"""

from __future__ import annotations

import numpy as np
import pytest
from drafters import export_golden_drafter
from engines import Driver, mixed_requests
from host_device import HostDevice
from speculation import CHEAP, SpeculatingDriver

from dspark_backend.calibration import Calibration
from dspark_backend.drafting_alone import DraftQuery, draft_alone
from dspark_backend.engine import Engine
from dspark_backend.scoring import score
from dspark_backend.speculation import Drafting
from dspark_backend.stages.batch import RowMove, Segment, StepBatch
from dspark_backend.stages.cuda.device import Memory
from dspark_backend.stages.cuda.rows import DeviceRows, RowSpan
from dspark_backend.stages.cuda.slots import CacheLayout, DeviceSlots
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_backend.stages.placement import Placement
from dspark_backend.stages.rows import joined

NAME = "qwen3_rnn"


@pytest.fixture(scope="module")
def drafter(golden_artifacts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("placed") / "drafter"
    export_golden_drafter(NAME, golden_artifacts[NAME], folder)
    return folder


@pytest.fixture
def device():
    return HostDevice()


def placed_driver(verifier, drafter, device) -> SpeculatingDriver:
    driver = SpeculatingDriver(verifier, drafter)
    placement = Placement(device)
    driver.stage = OnnxRuntimeVerifier(verifier, 1, placement=placement)
    driver.drafter = OnnxRuntimeDrafter(drafter, verifier, 1, placement=placement)
    gamma = driver.drafter.artifact.block_size
    drafting = Drafting(driver.drafter, Calibration.identity(gamma), CHEAP)
    driver.engine = Engine(driver.stage, driver.tokenizer, driver.config, drafting, driver.records.append)
    return driver


def test_speculation_of_mixed_requests(golden_artifacts, drafter, device):
    wanted = mixed_requests()
    usual = SpeculatingDriver(golden_artifacts[NAME], drafter).run(*wanted)
    placed = placed_driver(golden_artifacts[NAME], drafter, device)
    found = placed.run(*wanted)
    assert [sink.tokens() for sink in found] == [sink.tokens() for sink in usual]
    assert any(record.accepted for record in placed.records)


def test_greedy_requests_fetch_nothing_of_vocabulary_size(golden_artifacts, device):
    artifact = golden_artifacts[NAME]
    driver = Driver(artifact, OnnxRuntimeVerifier(artifact, 1, placement=Placement(device)))
    driver.run(*[one for one in mixed_requests() if one.sampling.greedy])
    assert device.downloads == 0
    driver.run(*[one for one in mixed_requests() if not one.sampling.greedy])
    assert device.downloads > 0


def test_scores(golden_artifacts, device):
    artifact, tokens = golden_artifacts[NAME], list(range(1, 40))
    expected = score(OnnxRuntimeVerifier(artifact, 1), tokens, want_logits=True)
    found = score(OnnxRuntimeVerifier(artifact, 1, placement=Placement(device)), tokens, want_logits=True)
    assert expected.logits is not None and found.logits is not None
    assert found.logits.tobytes() == expected.logits.tobytes()
    assert found.log_probs.tolist() == expected.log_probs.tolist()


def test_features_from_the_host(golden_artifacts, drafter, device):
    stages = [
        OnnxRuntimeDrafter(drafter, golden_artifacts[NAME], 1, placement=Placement(where)) for where in (None, device)
    ]
    width = stages[0].artifact.hidden_size * len(stages[0].artifact.target_layer_ids)
    features = np.random.default_rng(1).normal(size=(300, width)).astype(np.float32)
    usual, placed = (draft_alone(stage, DraftQuery(features, 5)) for stage in stages)
    assert placed.tokens.tolist() == usual.tokens.tolist()
    assert placed.probabilities.tobytes() == usual.probabilities.tobytes()


def test_closing_gives_everything_back(golden_artifacts, device):
    stage = OnnxRuntimeVerifier(golden_artifacts[NAME], 1, placement=Placement(device))
    stage.allocate(2, 128, ())
    stage.step(StepBatch.pack([Segment(1, 0, [3, 4], 0)]))
    assert device.blocks
    stage.close()
    assert not device.blocks


class TestRows:
    """Rows on a device, against numpy."""

    def make(self, device, count: int, width: int, seed: int) -> tuple[DeviceRows, np.ndarray]:
        numbers = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
        memory = Memory(device, numbers.nbytes)
        device.upload(memory.address, numbers)
        return DeviceRows(device, width, (RowSpan(memory, 0, count),)), numbers

    def test_slices_of_joined_rows(self, device):
        made = [self.make(device, count, 3, count) for count in (4, 1, 6)]
        rows = joined([one for one, _ in made])
        expected = np.concatenate([numbers for _, numbers in made])
        for start in range(12):
            for end in range(12):
                assert np.asarray(rows[start:end]).tolist() == expected[start:end].tolist(), (start, end)
                assert np.asarray(rows[start:end].copy()).tolist() == expected[start:end].tolist()
        assert rows[-1].tolist() == expected[-1].tolist() and len(rows[2:]) == 9
        with pytest.raises(IndexError):
            rows[11]

    def test_a_copy_outlives_what_it_is_of(self, device):
        rows, numbers = self.make(device, 5, 2, 1)
        kept = rows[1:4].copy()
        del rows
        assert len(device.blocks) == 1
        assert np.asarray(kept).tolist() == numbers[1:4].tolist()
        del kept
        assert not device.blocks

    def test_host_and_device_do_not_mix(self, device):
        rows, numbers = self.make(device, 2, 2, 1)
        with pytest.raises(TypeError, match="some of each"):
            joined([rows, numbers])


class TestSlots:
    """Copies between slots, against numpy."""

    LAYOUTS = (CacheLayout(2, 6, 3, 2), CacheLayout(1, 6, 4, 2))

    def fill(self, device, slots: DeviceSlots) -> list[np.ndarray]:
        arrays = []
        for layout, address in zip(slots.layouts, slots.addresses(0), strict=True):
            shape = (slots.num_slots, layout.num_heads, layout.capacity, layout.head_dim)
            numbers = np.random.default_rng(len(arrays)).integers(1, 60000, shape).astype(np.uint16)
            device.upload(address, numbers)
            arrays.append(numbers)
        return arrays

    def read(self, device, slots: DeviceSlots) -> list[np.ndarray]:
        return [
            device.array(address, (slots.num_slots, layout.num_heads, layout.capacity, layout.head_dim), np.uint16)
            for layout, address in zip(slots.layouts, slots.addresses(0), strict=True)
        ]

    @pytest.fixture
    def slots(self, device):
        slots = DeviceSlots(device, ())
        slots.reallocate(4, self.LAYOUTS, ())
        return slots

    def test_they_begin_as_zeros(self, device, slots):
        assert not any(array.any() for array in self.read(device, slots))

    def test_one_slot_to_another(self, device, slots):
        expected = self.fill(device, slots)
        slots.copy_rows(RowMove(1, 3, 4))
        slots.clear_rows(0)
        slots.clear_rows(2, 3)
        for array in expected:
            array[3, :, :4] = array[1, :, :4]
            array[0] = 0
            array[2, :, 3:] = 0
        assert all((found == want).all() for found, want in zip(self.read(device, slots), expected, strict=True))

    def test_another_capacity(self, device, slots):
        before = self.fill(device, slots)
        moves = [RowMove(2, 0, 5), RowMove(0, 1, 2)]
        longer = tuple(CacheLayout(one.num_heads, 9, one.head_dim, one.item) for one in self.LAYOUTS)
        slots.reallocate(3, longer, moves)
        for found, old in zip(self.read(device, slots), before, strict=True):
            expected = np.zeros_like(found)
            for move in moves:
                expected[move.target, :, : move.length] = old[move.source, :, : move.length]
            assert (found == expected).all()
        assert len(device.blocks) == 2

    @pytest.mark.parametrize(
        "moves",
        [
            [RowMove(0, 1, 3), RowMove(1, 0, 6)],
            [RowMove(3, 0, 2), RowMove(0, 1, 5), RowMove(2, 2, 4)],
            [],
        ],
    )
    def test_all_at_once_in_place(self, device, slots, moves):
        before = self.fill(device, slots)
        slots.permute(moves)
        for found, old in zip(self.read(device, slots), before, strict=True):
            for slot in range(4):
                move = next((move for move in moves if move.target == slot), None)
                if move is None:
                    assert not found[slot].any()
                else:
                    assert (found[slot, :, : move.length] == old[move.source, :, : move.length]).all()
