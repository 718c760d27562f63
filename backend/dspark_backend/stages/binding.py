"""I/O binding of numpy arrays to an ONNX Runtime session on the CPU, by address."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.batch import FloatArray
from dspark_backend.stages.cuda.device import Device
from dspark_backend.stages.denormals import can_flush_denormals, denormals_flushed
from dspark_backend.stages.processor import int8_saturates
from dspark_backend.stages.providers import check_available, check_started, load_libraries, session_providers
from dspark_backend.stages.rows import Rows
from dspark_backend.stages.settings import StageSettings
from dspark_backend.stages.slot_arrays import SlotWindow

_NEVER_CUT = 16
"""Columns of a product that ONNX Runtime gives to one thread whole."""


def exact_threads(threads: int, caches: Sequence[tuple[int, int]]) -> int:
    """How many threads give a row the same bits in any company, of ``threads`` wanted (0: one a core). ``caches``: key
    heads and channels of every layer.

    ONNX Runtime shares the attention's batched products out by cache row and key head. Threads beyond those cut the
    columns of a product, and narrow pieces are summed in another order: how narrow depends on how many requests share
    the step. A single request has as many products as a layer has key heads.
    """
    most = min((heads for heads, channels in caches if channels > _NEVER_CUT), default=None)
    wanted = threads or len(os.sched_getaffinity(0))
    return threads if most is None or wanted <= most else most


def session_options(threads: int) -> ort.SessionOptions:
    """How sessions run; ``threads`` 0 is one a core."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if int8_saturates():
        # Unsigned x unsigned products, slower but exact. The option is not free where it is not needed: 2.6 times the
        # time for the LM head of SmolLM2 over 32 rows on a processor with VNNI.
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Threads that go on spinning after a run take the cores from the other session's: a verification step behind a
    # draft took 1.6 to 1.9 times as long as one behind a step. No spinning at all costs up to 5%; a pool that both
    # share is as fast as this, but a setting of the whole process; one thread for the drafter gains nothing in int8 and
    # makes drafts up to 1.7 times as long in float32. Affinities, block sizes, memory patterns and the arena are within
    # noise (tests/bench/bench_threads.py).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if can_flush_denormals():
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options


def open_session(
    path: Path,
    threads: int,
    shared: dict[str, FloatArray] | None = None,
    settings: StageSettings | None = None,
    device: Device | None = None,
) -> ort.InferenceSession:
    """A session of a graph, on the CPU unless ``settings`` name another provider.

    ``shared`` provides initializers that the file only names; ``device`` is the one whose stream the session uses.

    Raises:
        ArtifactError: ONNX Runtime refuses the graph.
        ConfigError: the provider is not installed, or did not start.
    """
    settings = settings or StageSettings(threads)
    if settings.on_device:
        check_available(settings.provider)
        load_libraries()
    options = session_options(threads)
    if shared:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in shared.values()]
        options.add_external_initializers(list(shared), values)
    try:
        with denormals_flushed():  # ONNX Runtime changes the thread that makes the process's first session
            session = ort.InferenceSession(str(path), options, providers=session_providers(settings, device))
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise ArtifactError(f"{path}: ONNX Runtime cannot load the graph: {error}") from error
    if settings.on_device:
        check_started(settings.provider, session.get_providers())
    return session


def outputs_of(
    session: ort.InferenceSession, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """The named outputs of a session of :func:`open_session`, in memory of their own."""
    with denormals_flushed():
        found: list[NDArray[Any]] = session.run(list(names), dict(inputs))
    return found


class BoundArrays:
    """Arrays of one side of a binding, by name: memory is kept, and bound anew only where a shape changes."""

    def __init__(self, bind: Callable[..., None]) -> None:
        self._bind = bind
        self._memory: dict[str, NDArray[Any]] = {}
        self._views: dict[str, NDArray[Any]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """The array of this name: of this shape and dtype, bound, with whatever numbers it had before."""
        view = self._views.get(name)
        if view is not None and view.shape == shape:
            return view
        size = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.size < size:
            # Twice as much as before: memory that is never touched costs nothing.
            memory = np.empty(max(size, 1 if memory is None else 2 * memory.size), dtype=dtype)
            self._memory[name] = memory
        view = memory[:size].reshape(shape)
        self._bind(name, "cpu", 0, view.dtype, shape, view.ctypes.data)
        self._views[name] = view
        return view

    def bind_again(self) -> None:
        """Bind all arrays anew, for a session that reads them when they are bound."""
        for name, view in self._views.items():
            self._bind(name, "cpu", 0, view.dtype, view.shape, view.ctypes.data)

    def forget(self, name: str) -> None:
        """Something else is bound under this name."""
        self._views.pop(name, None)

    def clear(self) -> None:
        """What was bound is bound no more."""
        self._views.clear()


class CpuBinding:
    """A session with its bound arrays: fill those that ``input`` gives, ``run``, read those that ``output`` gave.

    Both stay the binding's: the next round writes over them.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._inputs = BoundArrays(self._binding.bind_input)
        self._outputs = BoundArrays(self._binding.bind_output)
        self._window: SlotWindow | None = None

    def input(self, name: str, shape: tuple[int, ...], dtype: DTypeLike = np.int64) -> NDArray[Any]:
        """The array that a graph input reads."""
        return self._inputs.array(name, shape, dtype)

    def output(self, name: str, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """The array that a graph output goes to."""
        return self._outputs.array(name, shape, dtype)

    def cache(self, window: SlotWindow) -> None:
        """Bind a window of the slot cache, the same memory as input and as output."""
        if self._window is window:
            return
        for index, value in enumerate(window.values):
            name = f"{'value' if index % 2 else 'key'}_cache_{index // 2}"
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(f"{name}_out", value)
        self._window = window

    def input_rows(self, name: str, rows: Rows) -> None:
        """Give a graph input these rows."""
        array = np.asarray(rows)
        self.input(name, array.shape, np.float32)[:] = array

    def output_rows(self, name: str, shape: tuple[int, int]) -> Rows:
        """The rows of a graph output."""
        return self.output(name, shape)

    def run(self) -> None:
        with denormals_flushed():
            self._session.run_with_iobinding(self._binding)

    def clear(self) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._inputs.clear()
        self._outputs.clear()
        self._window = None
