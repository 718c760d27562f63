"""What the TensorRT runtime decides without a device: buffers, profiles, where rows go, graphs, engines to refuse."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.errors import ArtifactError, ConfigError, InternalError
from dspark_backend.stages.batch import Segment, StepBatch
from dspark_backend.stages.cuda.device import CudaDevice, open_cuda
from dspark_backend.stages.draft_batch import ContextRows, DraftBatch
from dspark_backend.stages.engine_contract import CacheShape, Profile, Range, VerifierTensors, Workload
from dspark_backend.stages.engine_info import EngineInfo, ProfileInfo
from dspark_backend.stages.tensorrt.engine_file import (
    TensorRtContext,
    TensorRtEngine,
    check_info,
    deserialise,
    load_module,
    read_engine,
)
from dspark_backend.stages.tensorrt.graphs import GraphCache, GraphKey
from dspark_backend.stages.tensorrt.plan import ALIGNMENT, ITEM_BYTES, BufferPlan
from dspark_backend.stages.tensorrt.profiles import choose, engine_profiles, fit, rounded
from dspark_backend.stages.tensorrt.scatter import View, fill_draft, fill_verifier, pieces, rows_per_slot

WORK = Workload(max_context=1000, slots=16, block_size=7, prefill_chunk=512)
TENSORS = VerifierTensors("float16", 500, 64, 3, WORK.capacity, [CacheShape(2, 32)] * 4)


class TestPlan:
    """Every buffer is in the block, at its largest, and none over another."""

    def test_regions(self):
        profiles = WORK.verifier_profiles()
        elsewhere = [spec.name for spec in TENSORS.specs if "cache" in spec.name or "shared" in spec.name]
        plan = BufferPlan.of(TENSORS.specs, profiles, elsewhere)
        assert plan.regions.keys() == {spec.name for spec in TENSORS.specs} - set(elsewhere)
        end = 0
        for region in sorted(plan.regions.values(), key=lambda region: region.offset):
            assert region.offset % ALIGNMENT == 0 and region.offset >= end
            end = region.offset + region.size
            for profile in profiles:
                highest = {dim: limits.high for dim, limits in profile.ranges.items()}
                assert np.prod(region.spec.shape(highest)) * ITEM_BYTES[region.spec.dtype] <= region.size
        assert end <= plan.total
        assert plan.regions["logits"].size == 128 * 500 * 4
        assert plan.regions["query_index"].size == 16 * 512 * 8


class TestProfiles:
    """The first that holds a step, and sizes rounded within it."""

    def test_rounding(self):
        found = [rounded(size) for size in range(1, 26)]
        assert found == [1, 2, 3, 4, 6, 6, 8, 8] + [12] * 4 + [16] * 4 + [24] * 8 + [32]

    @given(st.integers(1, 5000))
    def test_rounding_wastes_at_most_half(self, size):
        assert size <= rounded(size) <= max(size * 1.5, size + 1)

    def test_ranges_bound_rounding(self):
        assert fit(5, Range(1, 4, 5)) == 5 and fit(1, Range(4, 4, 9)) == 4 and fit(6, Range(1, 4, 5)) is None

    @pytest.mark.parametrize(
        ("tokens", "columns", "name"),
        [(1, 1, "verify_8"), (8, 8, "verify_8"), (9, 3, "verify_32"), (32, 8, "verify_32"), (33, 8, "verify_128"),
         (128, 8, "verify_128"), (9, 9, "prefill"), (512, 512, "prefill"), (640, 512, "prefill")],
    )  # fmt: skip
    def test_by_token_count(self, tokens, columns, name):
        profiles = WORK.verifier_profiles()
        needed = {"B": tokens, "N": 1, "R": 3, "Q": columns, "C": 100}
        choice = choose(profiles, needed, {"R": 16, "C": 100})
        assert profiles[choice.index].name == name
        assert all(choice.sizes[symbol] >= size for symbol, size in needed.items())
        assert profiles[choice.index].holds(choice.sizes) and choice.sizes["C"] == 100

    def test_no_more_rows_than_there_are(self):
        needed = {"B": 4, "N": 4, "R": 5, "Q": 1, "C": 10}
        assert choose(WORK.verifier_profiles(), needed, {"R": 5}).sizes["R"] == 5

    def test_nothing_fits(self):
        needed = {"B": 641, "N": 1, "R": 1, "Q": 512, "C": 1}
        with pytest.raises(InternalError, match=r"profile for B=641.*verify_8 takes B from 1 to 8.*build the engine"):
            choose(WORK.verifier_profiles(), needed, {})

    def test_those_of_one_engine_in_their_order(self):
        ranges = {"B": (1, 2, 4), "N": (1, 1, 1)}
        named = [ProfileInfo("v", "a", ranges), ProfileInfo("d", "b", ranges), ProfileInfo("v", "c", ranges)]
        info = EngineInfo(10, 2, profiles=tuple(named))
        assert [one.name for one in engine_profiles(info, "v", ("B", "N"))] == ["a", "c"]
        with pytest.raises(ArtifactError, match=r"x: expected optimization profiles in stage.json, found none"):
            engine_profiles(info, "x", ("B",))
        with pytest.raises(ArtifactError, match="profile a: expected ranges of B, Q, got 'Q'; build it again"):
            engine_profiles(info, "v", ("B", "Q"))


def verifier_arrays(sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """As the runtime has them: full of what an earlier step left."""
    shapes = {spec.name: spec.shape(sizes) for spec in TENSORS.specs[:7]}
    return {name: np.full(shape, -999, dtype=np.int64) for name, shape in shapes.items()}


def written(update_index: np.ndarray, starts: np.ndarray) -> dict[tuple[int, int], int]:
    """(cache row, position) -> what is written there, as the engine does it."""
    return {
        (row, int(starts[row]) + column): int(update_index[row, column])
        for row in range(update_index.shape[0])
        for column in range(update_index.shape[1])
    }


segment_lists = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 90), st.integers(1, 8)),
    min_size=1,
    max_size=6,
    unique_by=lambda s: s[0],
)


class TestVerifierScatter:
    """Every token's row lands at its position; nobody's valid rows are touched."""

    @settings(deadline=None)
    @given(segment_lists)
    def test_rows_land_where_they_belong(self, chosen):
        capacity, num_slots = 120, 8
        batch = StepBatch.pack([Segment(slot, start, list(range(100, 100 + n)), 0) for slot, start, n in chosen])
        profiles = (Profile("p", {symbol: Range(1, 8, 64) for symbol in "BNRQC"}),)
        needed = {"B": batch.num_tokens, "N": batch.num_tokens, "R": int(np.ptp(batch.slots)) + 1,
                  "Q": batch.layout.longest}  # fmt: skip
        sizes = dict(choose(profiles, needed, {"R": num_slots}).sizes) | {"C": 64}
        view = View.over(batch.slots, sizes["R"], num_slots)
        assert view.first >= 0 and view.first + view.count <= num_slots
        arrays = verifier_arrays(sizes)
        fill_verifier(arrays, batch, view, sizes, capacity)
        found = written(arrays["query_index"], arrays["write_starts"])
        assert max(position for _, position in found) < capacity
        token = 0
        for slot, start, n in chosen:
            row = slot - view.first
            for column in range(n):
                assert found[row, start + column] == token
                assert (arrays["rows"][token], arrays["columns"][token]) == (row, column)
                assert arrays["positions"][token] == start + column
                token += 1
            assert min(position for at, position in found if at == row) == start
        owner = np.repeat([slot - view.first for slot, _, _ in chosen], [n for _, _, n in chosen])
        busy = set(owner.tolist())
        assert all(owner[index] == row for (row, _), index in found.items() if row in busy), "another request's rows"
        idle = set(range(view.count)) - {slot - view.first for slot, _, _ in chosen}
        assert all(position >= capacity - sizes["Q"] for row, position in found if row in idle)
        for name, array in arrays.items():
            limit = {"query_index": token, "rows": view.count, "logit_rows": token}.get(name, capacity + 1000)
            assert ((array >= 0) & (array < limit)).all(), name

    def test_no_room_behind_the_last_row(self):
        sizes = {"B": 2, "N": 2, "R": 1, "Q": 8, "C": 16}
        batch = StepBatch.pack([Segment(0, 9, [1, 2], 0)])
        with pytest.raises(InternalError, match="room for 8 rows behind position 9, there are 16 in all"):
            fill_verifier(verifier_arrays(sizes), batch, View(0, 1), sizes, 16)


def draft_arrays(count: int, rows: int, width: int, block: int, context: int) -> dict[str, np.ndarray]:
    shapes = {"context_positions": (context,), "update_index": (rows, width), "write_starts": (rows,),
              "query_index": (rows, block), "uniforms": (count, block)}  # fmt: skip
    singles = ("anchors", "block_rows", "starts", "temperature", "top_k", "top_p", "min_p")
    return {name: np.full(shape, -9.0) if name == "uniforms" else np.full(shape, -9) for name, shape in
            (shapes | dict.fromkeys(singles, (count,))).items()}  # fmt: skip


def draft_of(context: ContextRows, slots: list[int], starts: list[int], block: int) -> DraftBatch:
    ones = np.ones(len(slots), dtype=np.float32)
    return DraftBatch(context, np.arange(len(slots)) + 40, np.array(slots), np.array(starts),
                      np.ones((len(slots), block), dtype=np.float32), ones, np.ones(len(slots), dtype=np.int64), ones,
                      ones * 0)  # fmt: skip


class TestDraftScatter:
    """A request's block lies right behind its context; those without either stay as they are."""

    def test_context_and_blocks(self):
        # Slot 2 drafts behind 3 new rows, slot 4 behind none, slot 5 has context alone, slot 3 takes no part.
        context = ContextRows(np.zeros((5, 2), np.float32), np.array([7, 20, 8, 21, 9]), np.array([2, 5, 2, 5, 2]))
        sizes = {"M": 6, "D": 3, "R": 4, "W": 8, "C": 40}
        arrays = draft_arrays(3, 4, 8, 3, 6)
        fill_draft(arrays, draft_of(context, [4, 2], [30, 10], 3), View(2, 4), sizes, 50)
        assert arrays["write_starts"].tolist() == [7, 42, 30, 20]
        assert arrays["update_index"].tolist() == [
            [0, 2, 4, 9, 10, 11, 11, 11], [0] * 8, [6, 7, 8, 8, 8, 8, 8, 8], [1, 3, 3, 3, 3, 3, 3, 3],
        ]  # fmt: skip
        assert arrays["query_index"].tolist() == [[3, 4, 5], [0, 0, 0], [0, 1, 2], [0, 0, 0]]
        assert arrays["block_rows"].tolist() == [2, 0, 0] and arrays["anchors"].tolist() == [40, 41, 0]
        assert arrays["temperature"].tolist() == [1, 1, 1] and arrays["top_k"].tolist() == [1, 1, 1]
        assert arrays["context_positions"].tolist() == [7, 20, 8, 21, 9, 0]

    def test_a_gap_is_refused(self):
        sizes, arrays = {"M": 2, "D": 1, "R": 1, "W": 6, "C": 40}, draft_arrays(1, 1, 6, 3, 2)
        holes = ContextRows(np.zeros((2, 2), np.float32), np.array([7, 9]), np.zeros(2, np.int64))
        with pytest.raises(InternalError, match=r"slot 0: expected consecutive positions, got \[7, 9\]"):
            fill_draft(arrays, draft_of(holes, [0], [10], 3), View(0, 1), sizes, 50)
        whole = ContextRows(np.zeros((2, 2), np.float32), np.array([7, 8]), np.zeros(2, np.int64))
        with pytest.raises(InternalError, match="block of slot 0: expected it right behind its context, got"):
            fill_draft(arrays, draft_of(whole, [0], [10], 3), View(0, 1), sizes, 50)

    @given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 9), st.integers(1, 5))
    def test_pieces_hold_the_limits(self, slots, most, most_each):
        array = np.array(slots, dtype=np.int64)
        context = ContextRows(np.zeros((len(slots), 1), np.float32), np.arange(len(slots)), array)
        found = pieces(context, most, most_each)
        assert np.concatenate([array[piece] for piece in found]).tolist() == slots
        assert all(len(array[piece]) <= most and rows_per_slot(array[piece]) <= most_each for piece in found)


class TestGraphs:
    """Captured at the second sight, forgotten when others are used more."""

    def key(self, tokens: int, first: int = 0) -> GraphKey:
        return GraphKey.of(0, {"B": tokens, "R": 1}, first)

    def test_keys(self):
        assert self.key(3) == GraphKey.of(0, {"R": 1, "B": 3}, 0)
        assert len({self.key(3), self.key(4), self.key(3, 1), GraphKey.of(1, {"B": 3, "R": 1}, 0)}) == 4

    def test_second_sight(self):
        graphs: GraphCache[int] = GraphCache(2, lambda entry: None)
        assert [graphs.worth_capturing(self.key(3)) for _ in range(2)] == [False, True]
        for tokens in range(10, 18):
            graphs.worth_capturing(self.key(tokens))
        assert not graphs.worth_capturing(self.key(3)), "long ago"

    def test_the_least_recently_used_goes(self):
        gone: list[int] = []
        graphs: GraphCache[int] = GraphCache(2, gone.append)
        graphs.put(self.key(1), 1)
        graphs.put(self.key(2), 2)
        assert graphs.get(self.key(1)) == 1
        graphs.put(self.key(3), 3)
        assert gone == [2] and graphs.get(self.key(2)) is None
        graphs.clear()
        assert sorted(gone) == [1, 2, 3] and len(graphs) == 0


class TestEngineFile:
    """An engine that is not the one that was built, or not for here, is refused before it is loaded."""

    INFO = EngineInfo(64, 8, "tensorrt_rtx", "1.7.1.116", "fp16", ("sm86", "sm89"), (), {"v.engine": "00"})

    def test_no_engine_was_built(self, tmp_path):
        for info in (None, EngineInfo(64, 8)):
            with pytest.raises(ArtifactError, match=r"expected built engines, found the graph alone; .*export engine"):
                check_info(info, tmp_path, (8, 9))

    def test_another_gpu(self, tmp_path):
        assert check_info(self.INFO, tmp_path, (8, 9)) is self.INFO
        with pytest.raises(ArtifactError, match=r"this GPU \(sm90\), they were built for sm86, sm89; .*--target sm90"):
            check_info(self.INFO, tmp_path, (9, 0))

    def test_an_unknown_builder(self, tmp_path):
        with pytest.raises(ArtifactError, match="builder tensorrt or tensorrt_rtx, got 'os'"):
            check_info(EngineInfo(64, 8, "os", "1", engines={"v.engine": ""}), tmp_path, (8, 9))

    def test_a_builder_that_is_not_here(self, tmp_path):
        if importlib.util.find_spec("tensorrt") is not None:
            pytest.skip("tensorrt is installed")
        with pytest.raises(ArtifactError, match=r"package tensorrt 10\.9 that built the engines, which cannot be"):
            load_module(EngineInfo(64, 8, "tensorrt", "10.9", engines={"v.engine": ""}), tmp_path)

    def test_another_version(self, tmp_path):
        trt = pytest.importorskip("tensorrt_rtx")
        info = EngineInfo(64, 8, "tensorrt_rtx", "1.0.0", engines={"v.engine": ""})
        with pytest.raises(ArtifactError, match=rf"expected tensorrt_rtx 1\.0\.0, .* found {trt.__version__}; install"):
            load_module(info, tmp_path)
        assert load_module(EngineInfo(64, 8, "tensorrt_rtx", trt.__version__), tmp_path) is trt

    def test_other_bytes(self, tmp_path):
        with pytest.raises(ArtifactError, match=r"v.engine: expected an engine, found none"):
            read_engine(tmp_path, "v.engine", self.INFO)
        (tmp_path / "v.engine").write_bytes(b"engine")
        with pytest.raises(ArtifactError, match=r"expected SHA-256 00\.\.\. as stage.json says, got"):
            read_engine(tmp_path, "v.engine", self.INFO)
        digest = hashlib.sha256(b"engine").hexdigest()
        info = EngineInfo(64, 8, "tensorrt_rtx", engines={"v.engine": digest})
        assert read_engine(tmp_path, "v.engine", info) == b"engine"

    def test_bytes_that_are_no_engine(self, tmp_path):
        trt = pytest.importorskip("tensorrt_rtx")
        with pytest.raises(ArtifactError, match=r"v.engine: tensorrt_rtx .* cannot load the engine"):
            deserialise(trt, b"no engine at all" * 100, tmp_path / "v.engine", (), 1, 0)


class TestTensorRtCalls:
    """What the runtime calls of TensorRT is there, under these names and with these arguments."""

    def test_names(self):
        trt = pytest.importorskip("tensorrt_rtx")
        assert hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED") and hasattr(trt.TensorIOMode, "INPUT")
        for name in ("INT64", "FLOAT", "HALF", "BF16"):
            assert hasattr(trt.DataType, name)
        for kind, ours in ((trt.ICudaEngine, TensorRtEngine), (trt.IExecutionContext, TensorRtContext)):
            called = set(
                re.findall(r"(?:self\._engine|engine|context|self\._context)\.([a-z_0-9]+)", inspect.getsource(ours))
            )
            there = set(dir(trt.ICudaEngine)) | set(dir(trt.IExecutionContext))
            assert len(called) > 2 and called <= there, (kind, called - there)

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("set_device_memory", ["memory: typing.SupportsInt", "size: typing.SupportsInt"]),
            (
                "set_optimization_profile_async",
                ["profile_index: typing.SupportsInt", "stream_handle: typing.SupportsInt"],
            ),
            ("set_tensor_address", ["name: str", "memory: typing.SupportsInt"]),
            ("set_input_shape", ["name: str", "shape: tuple"]),
            ("execute_async_v3", ["stream_handle: typing.SupportsInt"]),
            ("is_stream_capturable", ["SupportsInt"]),
        ],
    )
    def test_arguments(self, name, arguments):
        trt = pytest.importorskip("tensorrt_rtx")
        signature = getattr(trt.IExecutionContext, name).__doc__
        assert all(argument in signature for argument in arguments), signature


class TestNoDevice:
    """Machines without a GPU are told so."""

    def test_without_cuda_python(self):
        if importlib.util.find_spec("cuda") is not None:
            pytest.skip("cuda-python is installed")
        with pytest.raises(ConfigError, match=r"device: expected the package cuda-python.*pip install"):
            open_cuda(0)

    def test_with_cuda_python(self):
        runtime = pytest.importorskip("cuda.bindings.runtime")
        if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
            pytest.skip("there is a GPU")
        with pytest.raises(ConfigError, match=r"device: expected a CUDA device, found none .*NVIDIA's driver"):
            CudaDevice(0, runtime)

    def test_every_function_that_is_called_exists(self):
        runtime = pytest.importorskip("cuda.bindings.runtime")
        names = [name for name in dir(runtime) if name.startswith("cuda")]
        source = inspect.getsource(CudaDevice)
        called = set(re.findall(r"\"(cuda[A-Z]\w+)\"", source)) | set(re.findall(r"runtime\.(cuda\w+)", source))
        assert called and called <= set(names)
