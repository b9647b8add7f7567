"""A causal LM's TensorRT engine with its caches in device memory: what crosses the bus per token is ids and one row.

Each row of the scheduler is one sequence with buffers of its own; a step runs the rows one after the other. A cache
that grows by copies goes to and fro between two buffers; one that is updated in place is past and present at once.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
PAST, PRESENT = "past_key_values.", "present."
PREFILL, DECODE = 0, 1
BFLOAT16 = np.uint16  # NumPy has no type for it; the bits travel as they are
TYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": BFLOAT16,
    "INT64": np.int64,
    "INT32": np.int32,
}


class Device:
    """The few calls of the CUDA driver that this needs; the driver alone, no toolkit."""

    def __init__(self, ordinal: int) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        device, self.context, self.stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), ordinal)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)
        self.enter()
        self.call("cuStreamCreate", ctypes.byref(self.stream), 1)  # does not wait for the default stream

    def call(self, name: str, *args: Any) -> None:
        if code := getattr(self.driver, name)(*args):
            raise RuntimeError(f"{name} failed with CUDA error {code}")

    def enter(self) -> None:
        """Makes the GPU the calling thread's."""
        self.call("cuCtxSetCurrent", self.context)

    def allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, values: Array) -> None:
        source = values.ctypes.data_as(ctypes.c_void_p)
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(values.nbytes))

    def download(self, values: Array, address: int) -> None:
        """Waits for what was queued, then fills `values`."""
        self.call("cuStreamSynchronize", self.stream)
        target = values.ctypes.data_as(ctypes.c_void_p)
        self.call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(values.nbytes))


@dataclass
class Row:
    """Addresses of one sequence's caches, in the order of the parts; `past` holds the tokens so far."""

    past: list[int]
    present: list[int]


class TensorRTEngine:
    """Sequences of at most `length` tokens; memory for a row is taken when it is first used.

    trt   the module that built the engine: tensorrt or tensorrt_rtx
    """

    def __init__(self, model: Path, trt: Any, device: Device, length: int) -> None:
        self.device = device
        for library in sorted(model.parent.glob("*.so")):
            if not trt.get_plugin_registry().load_library(str(library)):
                raise RuntimeError(f"TensorRT refuses the plugin library {library.name}")
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self.engine = self.runtime.deserialize_cuda_engine(model.read_bytes())
        if self.engine is None:
            raise RuntimeError("TensorRT cannot read the engine: was it built by this version, for this GPU?")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.parts = [name.removeprefix(PAST) for name in names if name.startswith(PAST)]
        _, self.heads, past, self.dim = self.engine.get_tensor_shape(PAST + self.parts[0])
        self.in_place = past >= 0  # a cache of fixed length
        self.length = past if self.in_place else length
        self.contexts = [self.open_context(profile) for profile in (PREFILL, DECODE)]
        self.scratch: dict[str, tuple[int, int]] = {}
        self.rows: dict[int, Row] = {}

    def open_context(self, profile: int) -> Any:
        context = self.engine.create_execution_context()
        context.set_optimization_profile_async(profile, self.device.stream.value)
        return context

    def dtype(self, name: str) -> type[np.generic]:
        return TYPES[self.engine.get_tensor_dtype(name).name]

    def row(self, number: int) -> Row:
        if number not in self.rows:
            size = self.heads * self.length * self.dim * np.dtype(self.dtype(PAST + self.parts[0])).itemsize
            past = [self.device.allocate(size) for _ in self.parts]
            self.rows[number] = Row(past, past if self.in_place else [self.device.allocate(size) for _ in self.parts])
        return self.rows[number]

    def memory(self, name: str, size: int) -> int:
        """Device memory of at least `size` bytes that all steps share."""
        address, room = self.scratch.get(name, (0, 0))
        if room < size:
            self.device.free(address)  # no step is in progress: each one ends with its download
            room = 1 << (size - 1).bit_length()
            address = self.device.allocate(room)
            self.scratch[name] = (address, room)
        return address

    def prefill(self, row: int, ids: Array, done: int) -> Array:
        """Logits [vocab] after the tokens `ids`, which follow `done` others in `row`."""
        self.device.enter()
        context = self.contexts[DECODE if done and len(ids) == 1 else PREFILL]
        buffers, end = self.row(row), done + len(ids)
        feeds = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, end)),
            "position_ids": np.arange(done, end)[None],
        }
        for name, value in feeds.items():
            array = np.ascontiguousarray(value, self.dtype(name))
            address = self.memory(name, array.nbytes)
            self.device.upload(address, array)
            context.set_input_shape(name, array.shape)
            context.set_tensor_address(name, address)
        shape = (1, self.heads, self.length if self.in_place else done, self.dim)
        for part, past, present in zip(self.parts, buffers.past, buffers.present, strict=True):
            context.set_input_shape(PAST + part, shape)
            context.set_tensor_address(PAST + part, past)
            context.set_tensor_address(PRESENT + part, present)
        *_, steps, vocab = context.get_tensor_shape("logits")
        logits = np.empty(vocab, self.dtype("logits"))
        address = self.memory("logits", steps * logits.nbytes)
        context.set_tensor_address("logits", address)
        if not context.execute_async_v3(self.device.stream.value):
            raise RuntimeError("the engine failed to run")
        self.device.download(logits, address + (steps - 1) * logits.nbytes)
        buffers.past, buffers.present = buffers.present, buffers.past
        return widened(logits)

    def decode(self, ids: Array, done: Array) -> Array:
        """Logits [rows, vocab] after one more token in each of the first rows, which hold `done` tokens."""
        return np.stack([self.prefill(row, ids[row : row + 1], int(done[row])) for row in range(len(ids))])

    def move(self, source: int, target: int, length: int) -> None:
        """Row `target` becomes what `source` is; no byte moves."""
        del length
        self.row(target)
        self.rows[source], self.rows[target] = self.rows[target], self.rows[source]


def widened(logits: Array) -> Array:
    """Logits as float32, from whatever the engine computes in."""
    if logits.dtype == BFLOAT16:
        return (logits.astype(np.uint32) << 16).view(np.float32)
    return logits.astype(np.float32)
