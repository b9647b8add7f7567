"""A causal LM's TensorRT engine with its caches in device memory: per step, ids and positions go in, logits come out.

A cache of fixed length is past and present at once, one buffer [rows, heads, length, dim] for each part of it. Row r of
every buffer belongs to the sequence in row r, and the first n rows decode as one batch of n, always in the same shapes
at the same addresses: a CUDA graph. A cache that grows by copies goes to and fro between two buffers, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .cuda import Device

Array = npt.NDArray[Any]
PAST, PRESENT = "past_key_values.", "present."
PREFILL, DECODE = 0, 1
ALIGNMENT = 256  # bytes, of every address that TensorRT is given
BFLOAT16 = np.uint16  # NumPy has no type for it; the bits travel as they are
TYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": BFLOAT16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
}


def open_engine(
    model: Path, libraries: Sequence[Path], trt: Any, device: Device, rows: int, length: int
) -> InPlaceEngine | GrowingEngine:
    """`rows` sequences of at most `length` tokens on an engine file; RuntimeError where it was not built for them.

    libraries   its plugins. Like the engine they are code: who calls has checked them
    trt         the module that built the engine: tensorrt or tensorrt_rtx
    """
    program = Program(model, libraries, trt, device)
    return (InPlaceEngine if program.length >= 0 else GrowingEngine)(program, rows, length)


def load_engine(model: Path, libraries: Sequence[Path], trt: Any) -> tuple[Any, Any]:
    """(runtime, engine) of an engine file and its plugins; the runtime must outlive the engine."""
    for library in libraries:
        if not trt.get_plugin_registry().load_library(str(library)):
            raise RuntimeError(f"TensorRT refuses the plugin library {library.name}")
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(model.read_bytes())
    if engine is None:
        raise RuntimeError("TensorRT cannot read the engine: was it built by this version, for this GPU?")
    return runtime, engine


class Program:
    """A deserialized engine on a device: what both kinds of cache need of it.

    parts         `i.key` and `i.value`
    heads, dim    of each part, [rows, heads, length, dim]
    length        tokens that a cache of fixed length holds; -1 for one that grows
    """

    def __init__(self, model: Path, libraries: Sequence[Path], trt: Any, device: Device) -> None:
        self.trt, self.device = trt, device
        self.runtime, self.engine = load_engine(model, libraries, trt)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.parts = [name.removeprefix(PAST) for name in names if name.startswith(PAST)]
        _, self.heads, self.length, self.dim = self.engine.get_tensor_shape(PAST + self.parts[0])
        self.vocab = self.engine.get_tensor_shape("logits")[-1]
        self.scratch: dict[str, tuple[int, int]] = {}
        self.fed: dict[str, Array] = {}  # alive while they are on their way

    def close(self) -> None:
        """Contexts must be gone by now."""
        del self.engine, self.runtime
        self.device.close()

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(TYPES[self.engine.get_tensor_dtype(name).name])

    def cache_bytes(self, length: int) -> int:
        """Bytes of `length` tokens in one part of one row's cache."""
        size: int = self.heads * length * self.dim * self.dtype(PAST + self.parts[0]).itemsize
        return size

    def most(self, name: str, profile: int) -> tuple[int, ...]:
        """The largest shape of an input that the engine was built for."""
        return tuple(self.engine.get_tensor_profile_shape(name, profile)[-1])

    def check_length(self, length: int) -> None:
        longest = self.most("attention_mask", PREFILL)[1]
        if length > longest:
            raise too_much("max_length", longest, length)

    @property
    def records(self) -> bool:
        """Does TensorRT record and replay CUDA graphs by itself? TensorRT-RTX does."""
        return hasattr(self.trt, "CudaGraphStrategy")

    def context(self, profile: int, *, constant: bool = False) -> Any:
        """An execution context; `constant`: its shapes and addresses will never change."""
        strategy = self.trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE  # as much as this profile needs
        if constant and self.records:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        context.set_optimization_profile_async(profile, self.device.stream.value)
        return context

    def memory(self, name: str, size: int) -> int:
        """Device memory of at least `size` bytes that steps of any shape share."""
        address, room = self.scratch.get(name, (0, 0))
        if room < size:
            self.device.free(address)  # no step is in progress: each one ends with its download
            room = 1 << (size - 1).bit_length()
            address = self.device.allocate(room)
            self.scratch[name] = (address, room)
        return address

    def bind(self, context: Any, name: str, shape: tuple[int, ...], address: int) -> None:
        if not context.set_input_shape(name, shape):
            raise RuntimeError(f"the engine was not built for {name} of shape {shape}")
        context.set_tensor_address(name, address)

    def feed(self, context: Any, **inputs: Array) -> None:
        """Binds inputs of any shape."""
        self.fed = {name: np.ascontiguousarray(value, self.dtype(name)) for name, value in inputs.items()}
        for name, array in self.fed.items():
            address = self.memory(name, array.nbytes)
            self.device.upload(address, array)
            self.bind(context, name, array.shape, address)

    def run(self, context: Any) -> None:
        if not context.execute_async_v3(self.device.stream.value):
            raise RuntimeError("the engine failed to run")

    def last_logits(self, context: Any) -> Array:
        """Runs a step of one row; its logits [vocab] at the last position."""
        steps = context.get_tensor_shape("logits")[1]
        logits = np.empty(self.vocab, self.dtype("logits"))
        address = self.memory("logits", steps * logits.nbytes)
        context.set_tensor_address("logits", address)
        self.run(context)
        self.device.download(logits, address + (steps - 1) * logits.nbytes)
        return widened(logits)

    def again(self, context: Any) -> Callable[[], None]:
        """What runs `context`, which has run once and must live on, again: a CUDA graph where it can be captured."""
        stream = self.device.stream.value
        graph = None if self.records else self.device.capture(lambda: bool(context.execute_async_v3(stream)))
        return partial(self.run, context) if graph is None else partial(self.device.launch, graph)


@dataclass(frozen=True)
class Step:
    """A decode step of some number of rows; `context` owns the memory that `run` works in, recorded or not."""

    context: Any
    run: Callable[[], None]


class InPlaceEngine:
    """Caches of fixed length: the first n rows decode as one batch.

    Behind a row's tokens its caches are zero: what lies there is hidden, but a NaN would shine through.
    """

    def __init__(self, program: Program, rows: int, length: int) -> None:
        self.program, self.device = program, program.device
        most, _ = program.most("input_ids", DECODE)
        if rows > most:
            raise too_much("max_batch", most, rows)
        program.check_length(length)
        self.row_bytes = program.cache_bytes(program.length)
        if rows > 1 and self.row_bytes % ALIGNMENT:
            raise RuntimeError(
                f"the rows of this engine's cache have {self.row_bytes} bytes, expected a multiple of {ALIGNMENT}: "
                "compile with a --max-length that is a multiple of 128, or set max_batch to 1"
            )
        allocate = self.device.allocate
        self.caches = {part: allocate(rows * self.row_bytes) for part in program.parts}
        self.prefill_context = program.context(PREFILL)
        self.mask_row = program.length * program.dtype("attention_mask").itemsize
        self.inputs = {
            "input_ids": allocate(rows * program.dtype("input_ids").itemsize),
            "attention_mask": allocate(rows * self.mask_row),
            "position_ids": allocate(rows * program.dtype("position_ids").itemsize),
        }
        self.logits = allocate(rows * program.vocab * program.dtype("logits").itemsize)
        # Ones, then as many zeros: the mask of any number of tokens is a piece of it.
        self.ones = allocate(2 * self.mask_row)
        ones = np.repeat([1, 0], program.length).astype(program.dtype("attention_mask"))
        self.device.upload(self.ones, ones)
        self.device.download(ones, self.ones)  # which waits for it
        self.steps: dict[int, Step] = {}

    def prefill(self, row: int, ids: Array, done: int) -> Array:
        """Logits [vocab] after the tokens `ids`, which follow `done` others in `row`."""
        self.device.enter()
        if not done:
            for address in self.caches.values():
                self.device.clear(address + row * self.row_bytes, self.row_bytes)
        context, end = self.prefill_context, done + len(ids)
        self.program.feed(context, input_ids=ids[None], position_ids=np.arange(done, end)[None])
        self.program.bind(context, "attention_mask", (1, end), self.ones)
        self.bind_caches(context, row, 1)
        return self.program.last_logits(context)

    def decode(self, ids: Array, done: Array) -> Array:
        """Logits [rows, vocab] after one more token in each of the first rows, which hold `done` tokens."""
        self.device.enter()
        program = self.program
        inputs = {"input_ids": ids, "position_ids": done}
        arrays = {name: np.ascontiguousarray(values, program.dtype(name)) for name, values in inputs.items()}
        for name, array in arrays.items():
            self.device.upload(self.inputs[name], array)
        for row, length in enumerate(done.tolist()):
            zeros = (program.length - length - 1) * program.dtype("attention_mask").itemsize
            self.device.copy(self.inputs["attention_mask"] + row * self.mask_row, self.ones + zeros, self.mask_row)
        self.run(len(ids))
        logits = np.empty((len(ids), program.vocab), program.dtype("logits"))
        self.device.download(logits, self.logits)
        return widened(logits)

    def run(self, rows: int) -> None:
        """A decode step of the first rows; the first one of each size is run as it is and then recorded."""
        if rows in self.steps:
            self.steps[rows].run()
            return
        context = self.program.context(DECODE, constant=True)
        shapes = {"input_ids": (rows, 1), "attention_mask": (rows, self.program.length), "position_ids": (rows, 1)}
        for name, shape in shapes.items():
            self.program.bind(context, name, shape, self.inputs[name])
        self.bind_caches(context, 0, rows)
        context.set_tensor_address("logits", self.logits)
        self.program.run(context)
        self.steps[rows] = Step(context, self.program.again(context))

    def bind_caches(self, context: Any, row: int, rows: int) -> None:
        """`rows` rows from `row` on, as past and as present."""
        shape = (rows, self.program.heads, self.program.length, self.program.dim)
        for part, address in self.caches.items():
            self.program.bind(context, PAST + part, shape, address + row * self.row_bytes)
            context.set_tensor_address(PRESENT + part, address + row * self.row_bytes)

    def move(self, source: int, target: int, length: int) -> None:
        """Row `target` becomes what `source` is, with the zeros behind its tokens."""
        del length
        self.device.enter()
        for address in self.caches.values():
            self.device.copy(address + target * self.row_bytes, address + source * self.row_bytes, self.row_bytes)

    def close(self) -> None:
        del self.steps, self.prefill_context
        self.program.close()


@dataclass
class Row:
    """Addresses of one sequence's caches, in the order of the parts; `past` holds the tokens so far."""

    past: list[int]
    present: list[int]


class GrowingEngine:
    """Caches that a step copies into longer ones: the rows of a step run one after the other.

    Memory for a row is taken when it is first used.
    """

    def __init__(self, program: Program, rows: int, length: int) -> None:
        del rows  # as many as there is memory for
        program.check_length(length)
        self.program, self.device, self.length = program, program.device, length
        self.contexts = [program.context(profile) for profile in (PREFILL, DECODE)]
        self.rows: dict[int, Row] = {}

    def row(self, number: int) -> Row:
        if number not in self.rows:
            size = self.program.cache_bytes(self.length)
            past, present = ([self.device.allocate(size) for _ in self.program.parts] for _ in range(2))
            self.rows[number] = Row(past, present)
        return self.rows[number]

    def prefill(self, row: int, ids: Array, done: int) -> Array:
        """Logits [vocab] after the tokens `ids`, which follow `done` others in `row`."""
        self.device.enter()
        program, buffers, end = self.program, self.row(row), done + len(ids)
        context = self.contexts[DECODE if done and len(ids) == 1 else PREFILL]
        positions = np.arange(done, end)[None]
        program.feed(context, input_ids=ids[None], attention_mask=np.ones((1, end)), position_ids=positions)
        for part, past, present in zip(program.parts, buffers.past, buffers.present, strict=True):
            program.bind(context, PAST + part, (1, program.heads, done, program.dim), past)
            context.set_tensor_address(PRESENT + part, present)
        logits = program.last_logits(context)
        buffers.past, buffers.present = buffers.present, buffers.past
        return logits

    def decode(self, ids: Array, done: Array) -> Array:
        """Logits [rows, vocab] after one more token in each of the first rows, which hold `done` tokens."""
        return np.stack([self.prefill(row, ids[row : row + 1], int(done[row])) for row in range(len(ids))])

    def move(self, source: int, target: int, length: int) -> None:
        """Row `target` becomes what `source` is; no byte moves."""
        del length
        self.row(target)
        self.rows[source], self.rows[target] = self.rows[target], self.rows[source]

    def close(self) -> None:
        del self.contexts
        self.program.close()


def too_much(name: str, most: int, found: int) -> RuntimeError:
    """The configuration asks for more than the engine can do."""
    option = f"--{name.replace('_', '-')}"
    return RuntimeError(
        f"{name}: expected at most {most}, which the engine was built for, found {found}: "
        f"lower it in config.pbtxt, or compile with {option} {found}"
    )


def widened(logits: Array) -> Array:
    """Logits as float32, from whatever the engine computes in."""
    if logits.dtype == BFLOAT16:
        return (logits.astype(np.uint32) << 16).view(np.float32)
    return logits.astype(np.float32)
