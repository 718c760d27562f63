"""Denormal numbers are zero on all threads that compute a graph, and on the caller's before and after as they were."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from dspark_backend.stages.binding import CpuBinding, open_session, outputs_of
from dspark_backend.stages.denormals import can_flush_denormals, denormals_flushed

DENORMAL = np.float32(1e-39)
ROWS = 1 << 16
"""So many that two threads share them."""

pytestmark = pytest.mark.skipif(not can_flush_denormals(), reason="not x86-64 with glibc")


def halved(values: np.ndarray) -> np.ndarray:
    return values * np.float32(0.5)


def denormals_live() -> bool:
    return bool(halved(np.full(4, DENORMAL)).all())


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    """y = 0.5 x"""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N"]))
    half = ir.Value(name="half", const_value=ir.tensor(np.float32(0.5), name="half"))
    node = ir.Node("", "Mul", [x, half], num_outputs=1)
    (y,) = node.outputs
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N"])
    body = ir.Graph([x], [y], nodes=[node], initializers=[half], opset_imports={"": 21}, name="halve")
    path = tmp_path_factory.mktemp("graph") / "halve.onnx"
    ir.save(ir.Model(body, ir_version=10), path)
    return path


def test_inside_and_outside_of_the_block():
    assert denormals_live()
    with denormals_flushed():
        assert not halved(np.full(4, DENORMAL)).any()
        with denormals_flushed():
            assert not denormals_live()
        assert not denormals_live()
    assert denormals_live()


def test_an_exception_leaves_nothing_behind():
    with pytest.raises(ZeroDivisionError), denormals_flushed():
        raise ZeroDivisionError
    assert denormals_live()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_session_flushes_on_every_thread(graph, threads):
    session = open_session(graph, threads)
    assert denormals_live()  # ONNX Runtime would change the thread that makes the first session of a process
    (found,) = outputs_of(session, ["y"], {"x": np.full(ROWS, DENORMAL)})
    assert not found.any()
    assert denormals_live()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_bound_session_flushes_on_a_thread_of_its_own(graph, threads):
    """The engine's thread did not make the session."""
    binding = CpuBinding(open_session(graph, threads))
    binding.input("x", (ROWS,), np.float32)[:] = DENORMAL
    found = binding.output("y", (ROWS,))
    found[:] = 1
    after: list[bool] = []

    def work() -> None:
        binding.run()
        after.append(denormals_live())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not found.any()
    assert after == [True]
