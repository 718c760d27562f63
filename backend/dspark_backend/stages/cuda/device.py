"""What stages ask of a device, and the one implementation: the CUDA runtime through ``cuda-python``."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dspark_backend.errors import ConfigError, InternalError


@dataclass(frozen=True)
class BlockCopy:
    """``height`` runs of ``width`` bytes, ``pitch`` bytes apart on either side."""

    target: int
    source: int
    pitch: int
    width: int
    height: int


class Device(Protocol):
    """A device and its one stream: what is asked of it happens in the order it was asked.

    All methods raise InternalError where the device refuses.
    """

    kind: str
    """As ONNX Runtime names it: cuda."""
    ordinal: int
    stream: int
    """Handle, for runtimes that enqueue work of their own."""

    def use(self) -> None:
        """Make this the device of the calling thread: first in everything that a stage does."""

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes."""

    def free(self, address: int) -> None:
        """Give memory back; work that was enqueued before may still use it."""

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Page-locked host memory, which lives as long as the array and its views."""

    def upload(self, target: int, source: NDArray[Any]) -> None:
        """Copy a contiguous array to the device. It may be changed after ``synchronize`` only, where it is pinned."""

    def download(self, target: NDArray[Any], source: int) -> None:
        """Fill a contiguous array from the device; the numbers are there after ``synchronize``."""

    def copy(self, target: int, source: int, size: int) -> None:
        """Bytes from one place of the device to another that does not overlap."""

    def copy_block(self, block: BlockCopy) -> None:
        """The same for runs of bytes."""

    def zero(self, address: int, size: int) -> None:
        """Fill with zeros."""

    def synchronize(self) -> None:
        """Wait until everything that was asked is done."""

    def capture(self, enqueue: Callable[[], None]) -> int:
        """A graph of the work that ``enqueue`` puts on the stream, which does not run. Its handle."""

    def launch(self, graph: int) -> None:
        """Run a graph."""

    def destroy(self, graph: int) -> None:
        """Forget a graph."""


class Memory:
    """Memory of a device that is freed with the last reference to it."""

    def __init__(self, device: Device, size: int) -> None:
        self.size = size
        self.address = device.allocate(size)
        self.release = weakref.finalize(self, device.free, self.address)
        # At exit the driver may be gone already, and takes everything back by itself.
        self.release.atexit = False


class CudaDevice:
    """Implements :class:`Device`; use :func:`open_cuda` to get one.

    Raises:
        ConfigError: cuda-python is not installed, or there is no such device.
    """

    kind = "cuda"

    def __init__(self, ordinal: int, runtime: ModuleType) -> None:
        self._runtime: Any = runtime
        self.ordinal = ordinal
        status, count = _outcome(runtime.cudaGetDeviceCount())
        if status or not count:
            raise ConfigError(
                f"device: expected a CUDA device, found none ({self._name(status)}); install NVIDIA's driver and give "
                "the container access to the GPU (--gpus), or serve an artifact for the CPU"
            )
        if not 0 <= ordinal < count:
            raise ConfigError(f"device: expected a CUDA device from 0 to {count - 1}, got {ordinal}")
        self.use()
        self._stream = self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def use(self) -> None:
        """Make this the device of the calling thread."""
        self._call("cudaSetDevice", self.ordinal)

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, such as (8, 9)."""
        attribute = self._runtime.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, self.ordinal)
        minor = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, self.ordinal)
        return int(major), int(minor)

    def allocate(self, size: int) -> int:
        self.use()
        return int(self._call("cudaMallocAsync", size, self._stream))

    def free(self, address: int) -> None:
        self._call("cudaFreeAsync", address, self._stream)

    def pinned(self, size: int) -> NDArray[np.uint8]:
        self.use()
        address = int(self._call("cudaMallocHost", size))
        block = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(block, self._runtime.cudaFreeHost, address).atexit = False
        array: NDArray[np.uint8] = np.ctypeslib.as_array(block)
        return array

    def upload(self, target: int, source: NDArray[Any]) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, self._stream)

    def download(self, target: NDArray[Any], source: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, self._stream)

    def copy_block(self, block: BlockCopy) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        pitch = block.pitch
        self._call(
            "cudaMemcpy2DAsync",
            block.target, pitch, block.source, pitch, block.width, block.height, kind, self._stream,
        )  # fmt: skip

    def zero(self, address: int, size: int) -> None:
        self._call("cudaMemsetAsync", address, 0, size, self._stream)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> int:
        # Of this thread alone: another one of the process may allocate meanwhile.
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:
            # The stream must leave capture mode, or everything after fails; what was captured is of no use.
            self._runtime.cudaStreamEndCapture(self._stream)
            raise
        captured = self._call("cudaStreamEndCapture", self._stream)
        try:
            return int(self._call("cudaGraphInstantiate", captured, 0))
        finally:
            self._call("cudaGraphDestroy", captured)

    def launch(self, graph: int) -> None:
        self._call("cudaGraphLaunch", graph, self._stream)

    def destroy(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, value = _outcome(getattr(self._runtime, name)(*arguments))
        if status:
            advice = ""
            if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
                advice = "; lower max_slots, or serve a smaller precision or context"
            raise InternalError(f"{name}: expected success on device {self.ordinal}, got {self._name(status)}{advice}")
        return value

    def _name(self, status: Any) -> str:
        _, text = _outcome(self._runtime.cudaGetErrorString(status))
        return text.decode() if isinstance(text, bytes) else str(status)


def _outcome(result: tuple[Any, ...]) -> tuple[Any, Any]:
    """(status, value) of what cuda-python's functions return; a status of 0 is success."""
    return result[0], result[1] if len(result) > 1 else None


@cache
def open_cuda(ordinal: int = 0) -> CudaDevice:
    """The device of this number; one object and one stream for all stages of the process.

    Raises:
        ConfigError: cuda-python is not installed, or there is no such device.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise ConfigError(
            f"device: expected the package cuda-python, which cannot be imported ({error}); "
            "install it: pip install 'dspark-triton[gpu]' or 'dspark-triton[tensorrt]'"
        ) from None
    return CudaDevice(ordinal, runtime)
