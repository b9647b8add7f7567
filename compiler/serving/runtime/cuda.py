"""The few calls of the CUDA driver that an engine needs around it: memory, copies, one stream, graphs. No toolkit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
NON_BLOCKING = 1  # the stream does not wait for the default stream
THREAD_LOCAL = 1  # what other threads do cannot spoil a capture


class Device:
    """One GPU and one stream, on which everything happens in order."""

    def __init__(self, ordinal: int) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.device, self.context, self.stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.held: set[int] = set()
        self.graphs: list[ctypes.c_void_p] = []
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(self.device), ordinal)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), self.device)
        self.enter()
        self.call("cuStreamCreate", ctypes.byref(self.stream), NON_BLOCKING)

    def call(self, name: str, *args: Any) -> None:
        if code := getattr(self.driver, name)(*args):
            raise RuntimeError(f"{name} failed with CUDA error {code}")

    def enter(self) -> None:
        """Makes the GPU the calling thread's."""
        self.call("cuCtxSetCurrent", self.context)

    def allocate(self, size: int) -> int:
        """`size` bytes, aligned to 256; what they hold is anything."""
        address = ctypes.c_uint64()
        if code := self.driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)):
            raise RuntimeError(
                f"the GPU has no {size} bytes left (CUDA error {code}): lower max_batch or max_length, or free some"
            )
        self.held.add(address.value)
        return address.value

    def free(self, address: int) -> None:
        self.held.discard(address)
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def close(self) -> None:
        """Frees all memory and graphs; nothing may use the device afterwards."""
        self.enter()
        for graph in self.graphs:
            self.call("cuGraphExecDestroy", graph)
        for address in list(self.held):
            self.free(address)
        self.call("cuStreamDestroy_v2", self.stream)
        self.call("cuDevicePrimaryCtxRelease_v2", self.device)

    def clear(self, address: int, size: int) -> None:
        self.call("cuMemsetD8Async", ctypes.c_uint64(address), ctypes.c_ubyte(0), ctypes.c_size_t(size), self.stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """From device memory to device memory; the two must not overlap."""
        addresses = ctypes.c_uint64(target), ctypes.c_uint64(source)
        self.call("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(size), self.stream)

    def upload(self, address: int, values: Array) -> None:
        """Queues a copy: `values` must live until the stream was waited for."""
        source = values.ctypes.data_as(ctypes.c_void_p)
        size = ctypes.c_size_t(values.nbytes)
        self.call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, size, self.stream)

    def download(self, values: Array, address: int) -> None:
        """Fills `values` when all that was queued before is done."""
        target = values.ctypes.data_as(ctypes.c_void_p)
        size = ctypes.c_size_t(values.nbytes)
        self.call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), size, self.stream)
        self.call("cuStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], bool]) -> ctypes.c_void_p | None:
        """A graph of what `work` queues, none of which runs now; None where something in it cannot be captured."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        if self.driver.cuStreamBeginCapture_v2(self.stream, THREAD_LOCAL):
            return None
        queued = work()
        failed = self.driver.cuStreamEndCapture(self.stream, ctypes.byref(graph))  # also where `work` gave up
        if queued and not failed:
            flags = ctypes.c_uint64(0)
            failed = self.driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, flags)
        if graph:
            self.call("cuGraphDestroy", graph)
        if not queued or failed:
            return None
        self.graphs.append(executable)
        return executable

    def launch(self, graph: ctypes.c_void_p) -> None:
        self.call("cuGraphLaunch", graph, self.stream)
