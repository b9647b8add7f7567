"""A stand-in for a GPU and TensorRT: the CUDA driver's calls on host memory, and ONNX Runtime as the engine.

What it shows: which shapes, addresses, profiles and types are handed over, and what is made of the results. What it
refuses is what the real ones refuse: shapes outside of a profile, addresses that are not aligned or not allocated.
Memory starts as NaN, and copies that overlap or leave their block fail.
"""

# ruff: noqa: N802, ARG002  (the names and the arguments are the driver's)
from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort

from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.backend.tensorrt.profiles import EngineLimits, profiles
from instantrt.compiler.serving.runtime.cuda import Device
from instantrt.compiler.serving.runtime.tensorrt_engine import open_engine

TYPES = {
    "tensor(int64)": ("INT64", np.int64),
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(int8)": ("INT8", np.int8),
}
ALIGNMENT = 256
PLAN = b"ftrt" + bytes([0] * 20) + bytes([10, 13, 0, 35]) + b"an engine"
OUT_OF_MEMORY = 2
NOT_PERMITTED = 900  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
ROWS, LENGTH = 4, 64  # of every plan
Shape = tuple[int, ...]


class HostDriver:
    """As much of libcuda as is used; a graph is a list of what was queued while it was captured."""

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.launches = 0
        self.captures = True  # does an engine let itself be captured?
        self.room = 1 << 30  # bytes

    def cuCtxSetCurrent(self, context: Any) -> int:
        return 0

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:
        self.room -= size.value
        if self.room < 0:
            return OUT_OF_MEMORY
        block = np.full(size.value + ALIGNMENT, 0xFF, np.uint8)  # NaN, if it is ever read unwritten
        block = block[-block.ctypes.data % ALIGNMENT :][: size.value]
        self.blocks[block.ctypes.data] = block
        address._obj.value = block.ctypes.data
        return 0

    def cuMemFree_v2(self, address: Any) -> int:
        if address.value:
            del self.blocks[address.value]
        return 0

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        base = max(start for start in self.blocks if start <= address)
        block = self.blocks[base][address - base :][:size]
        assert len(block) == size, "a step out of a block"
        return block

    def cuMemsetD8Async(self, address: Any, value: Any, size: Any, stream: Any) -> int:
        assert self.capturing is None
        self.bytes_at(address.value, size.value)[...] = value.value
        return 0

    def cuMemcpyDtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:
        assert self.capturing is None
        assert abs(target.value - source.value) >= size.value, "the copy overlaps itself"
        self.bytes_at(target.value, size.value)[...] = self.bytes_at(source.value, size.value)
        return 0

    def cuMemcpyHtoDAsync_v2(self, address: Any, source: Any, size: Any, stream: Any) -> int:
        assert self.capturing is None
        ctypes.memmove(self.bytes_at(address.value, size.value).ctypes.data, source, size.value)
        return 0

    def cuMemcpyDtoHAsync_v2(self, target: Any, address: Any, size: Any, stream: Any) -> int:
        assert self.capturing is None
        ctypes.memmove(target, self.bytes_at(address.value, size.value).ctypes.data, size.value)
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:
        return 0

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:
        self.capturing = []
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        assert self.capturing is not None
        captured, self.capturing = self.capturing, None
        if not self.captures:
            return NOT_PERMITTED
        graph._obj.value = len(self.graphs) + 1
        self.graphs[graph._obj.value] = captured
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        executable._obj.value = graph.value
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        return 0

    def cuGraphExecDestroy(self, executable: Any) -> int:
        del self.graphs[executable.value]
        return 0

    def cuStreamDestroy_v2(self, stream: Any) -> int:
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:
        return 0

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:
        self.launches += 1
        for work in self.graphs[executable.value]:
            work()
        return 0


class HostDevice(Device):
    """The real `Device` on the driver above."""

    def __init__(self) -> None:
        self.driver: Any = HostDriver()
        self.device, self.context, self.stream = ctypes.c_int(0), ctypes.c_void_p(1), ctypes.c_void_p(7)
        self.held, self.graphs = set(), []


@dataclass
class Engine:
    """An ONNX Runtime session as an engine; `ran` holds profile and input shapes of every run."""

    session: ort.InferenceSession
    driver: HostDriver
    profiles: Sequence[Mapping[str, tuple[Shape, Shape, Shape]]]
    ran: list[tuple[int, dict[str, Shape]]] = field(default_factory=list)
    recording: int = 0  # contexts that record their own graphs, as TensorRT-RTX does

    def __post_init__(self) -> None:
        self.specs = {t.name: t for t in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.specs)

    def get_tensor_name(self, i: int) -> str:
        return list(self.specs)[i]

    def get_tensor_shape(self, name: str) -> Shape:
        return tuple(d if isinstance(d, int) else -1 for d in self.specs[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=TYPES[self.specs[name].type][0])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Shape]:
        return list(self.profiles[profile][name])

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(cuda_graph_strategy=None, set_execution_context_allocation_strategy=lambda s: None)

    def create_execution_context(self, how: Any) -> Context:
        self.recording += getattr(how, "cuda_graph_strategy", None) == "whole"
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == 7
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        low, _, high = self.engine.profiles[self.profile][name]
        self.shapes[name] = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % ALIGNMENT == 0
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        assert name == "logits"
        return (*self.shapes["input_ids"], self.engine.get_tensor_shape("logits")[-1])

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        engine, ran, addresses, alive = self.engine, (self.profile, dict(self.shapes)), dict(self.addresses), ref(self)

        def work() -> None:
            assert alive() is not None, "a graph runs in the memory of its context"
            engine.ran.append(ran)
            run(engine, ran[1], addresses)

        if engine.driver.capturing is None:
            work()
        else:
            assert engine.ran[-1] == ran, "captured before it ever ran"
            engine.driver.capturing.append(work)
        return True


def run(engine: Engine, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
    def view(name: str, shape: Shape) -> np.ndarray:
        dtype = np.dtype(TYPES[engine.specs[name].type][1])
        size = int(np.prod(shape)) * dtype.itemsize
        return engine.driver.bytes_at(addresses[name], size).view(dtype).reshape(shape)

    feeds = {i.name: view(i.name, shapes[i.name]) for i in engine.session.get_inputs()}
    names = [o.name for o in engine.session.get_outputs()]
    for name, value in zip(names, engine.session.run(names, feeds), strict=True):
        view(name, value.shape)[...] = value


def stand_in(engine: Engine, *, rtx: bool = False) -> Any:
    """As much of the module tensorrt, or tensorrt_rtx, as is used; it reads the plan PLAN alone."""

    class Logger:
        WARNING = 2

        def __init__(self, level: int) -> None:
            assert level == self.WARNING

    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if plan == PLAN else None)
    strategies = SimpleNamespace(ON_PROFILE_CHANGE="on profile change")
    trt = SimpleNamespace(Logger=Logger, Runtime=lambda logger: runtime, ExecutionContextAllocationStrategy=strategies)
    if rtx:
        trt.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    return trt


@dataclass
class Subject:
    """An engine under test and what stands behind it."""

    engine: Any
    behind: Engine
    device: HostDevice


class Plan:
    """A graph as an engine file; `open` makes a new device and opens it there."""

    def __init__(self, graph: gs.Graph, folder: Path) -> None:
        self.onnx, self.file = folder / "model.onnx", folder / "model.engine"
        self.profiles = profiles(graph.inputs, EngineLimits(ROWS, LENGTH, 8), llm=True)
        write_model(graph, self.onnx)
        self.file.write_bytes(PLAN)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(self.onnx, options, providers=["CPUExecutionProvider"])

    def open(self, rows: int = ROWS, length: int = LENGTH, *, rtx: bool = False, captures: bool = True) -> Subject:
        device = HostDevice()
        device.driver.captures = captures
        behind = Engine(self.session, device.driver, self.profiles)
        return Subject(open_engine(self.file, (), stand_in(behind, rtx=rtx), device, rows, length), behind, device)
