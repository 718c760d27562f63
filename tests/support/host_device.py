"""A device whose memory is the host's: what stages ask of a GPU happens here at once, and can be looked at."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from dspark_backend.stages.cuda.device import BlockCopy


class HostDevice:
    """Implements ``Device``. ONNX Runtime's CPU provider can bind its addresses as they are.

    Every access is checked against what is allocated; memory is poisoned with NaN when it is handed out and when it is
    freed, so that a stage that forgets to clear or to keep some is found out.
    """

    kind = "cpu"
    ordinal = 0
    stream = 0

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.uploads = self.downloads = self.launches = 0
        self.downloaded_bytes = 0
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self._freed: list[np.ndarray] = []

    def use(self) -> None:
        pass

    def allocate(self, size: int) -> int:
        assert self.recording is None, "memory must not be allocated while a graph is captured"
        block = np.full(size + 64, 255, dtype=np.uint8)
        address = (block.ctypes.data + 63) // 64 * 64
        self.blocks[address] = block[address - block.ctypes.data :][:size]
        self._freed.append(block)  # an address is never given out twice
        return address

    def free(self, address: int) -> None:
        self.blocks.pop(address)[:] = 255

    def pinned(self, size: int) -> np.ndarray:
        return np.full(size, 255, dtype=np.uint8)

    def upload(self, target: int, source: np.ndarray) -> None:
        assert source.flags.c_contiguous
        self.uploads += 1
        self._move(self.checked(target, source.nbytes), source.ctypes.data, source.nbytes)

    def download(self, target: np.ndarray, source: int) -> None:
        assert target.flags.c_contiguous
        self.downloads += 1
        self.downloaded_bytes += target.nbytes
        self._move(target.ctypes.data, self.checked(source, target.nbytes), target.nbytes)

    def copy(self, target: int, source: int, size: int) -> None:
        self._move(self.checked(target, size), self.checked(source, size), size)

    def copy_block(self, block: BlockCopy) -> None:
        assert block.width <= block.pitch
        for row in range(block.height):
            self.copy(block.target + row * block.pitch, block.source + row * block.pitch, block.width)

    def zero(self, address: int, size: int) -> None:
        ctypes.memset(self.checked(address, size), 0, size)

    def synchronize(self) -> None:
        pass

    def capture(self, enqueue: Callable[[], None]) -> int:
        self.recording = []
        enqueue()
        handle = len(self.graphs) + 1
        self.graphs[handle], self.recording = self.recording, None
        return handle

    def launch(self, graph: int) -> None:
        self.launches += 1
        for work in self.graphs[graph]:
            work()

    def destroy(self, graph: int) -> None:
        del self.graphs[graph]

    def run(self, work: Callable[[], None]) -> None:
        """What a kernel does: recorded where a graph is captured, done otherwise."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """What is at an address."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.checked(address, size)
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype).reshape(shape)

    def checked(self, address: int, size: int) -> int:
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + len(block):
                return address
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated")

    @staticmethod
    def _move(target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size)
