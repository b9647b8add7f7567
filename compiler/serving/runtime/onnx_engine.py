"""A causal LM on ONNX Runtime with its KV cache in place: row r of every buffer belongs to the sequence in row r.

row 0   |##########......|     rows of different lengths decode together; attention_mask says how long each is
row 1   |####............|     a new sequence is prefilled alone, right in its row
row 2   |#######.........|     rows 0 .. n-1 are in use, so the batch is a prefix of the buffer, never a copy
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .cpus import usable_cpus
from .saturation import refuse_saturation

Array = npt.NDArray[Any]
PAST = "past_key_values."
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
SPIN_US = 100  # docs/facts.md, "Spinning"
SESSIONS: WeakValueDictionary[Any, ort.InferenceSession] = WeakValueDictionary()


def open_session(
    model: Path, threads: int = 0, spinning: bool | None = None, libraries: Sequence[Path] = ()
) -> ort.InferenceSession:
    """A session on the CPU; all that open the same file in the same way share one (docs/facts.md, "Prepacked weights").

    threads    0 is one a core, or as many as this process has CPUs where its affinity or its quota leave fewer
    spinning   idle threads wait for the next node on their CPUs; None: where no more threads than CPUs are there
    libraries  of operators of ours. They are code: who calls has checked them
    """
    if threads < 0:
        raise ValueError(f"threads: expected 0 or more, found {threads}")
    cpus = usable_cpus()
    threads = threads or (cpus if cpus < (os.cpu_count() or 1) else 0)
    spinning = threads <= cpus if spinning is None else spinning
    files = {path.name: path.stat() for path in sorted(model.parent.glob(f"{model.name}*"))}
    identity = tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in files.items())
    key = (model.resolve(), identity, threads, spinning, tuple(libraries))
    if (session := SESSIONS.get(key)) is None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # docs/facts.md, "Memory patterns"
        for library in libraries:
            options.register_custom_ops_library(str(library))
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        refuse_saturation(session)
        SESSIONS[key] = session
    return session


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """In small pages, which take memory as they are written (docs/facts.md, "Huge pages")."""
    if not prod(shape) or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, np.dtype(dtype).itemsize * prod(shape), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def empty_cache(session: ort.InferenceSession, rows: int, length: int) -> dict[str, Array]:
    """A buffer [rows, heads, length, dim] for each `i.key` and `i.value`, of the model's own type."""
    return {
        each.name.removeprefix(PAST): zeros((rows, each.shape[1], length, each.shape[3]), TYPES[each.type])
        for each in session.get_inputs()
        if each.name.startswith(PAST)
    }


class SharedEngine:
    """`rows` sequences of at most `length` tokens; pages of the cache take memory when they are first written."""

    def __init__(
        self,
        model: Path,
        rows: int,
        length: int,
        threads: int = 0,
        spinning: bool | None = None,
        libraries: Sequence[Path] = (),
    ) -> None:
        self.session = open_session(model, threads, spinning, libraries)
        self.cache = empty_cache(self.session, rows, length)
        vocab = next(output.shape[-1] for output in self.session.get_outputs() if output.name == "logits")
        self.logits = np.empty((rows, 1, vocab), np.float32)
        self.bindings = [self.bind(0, n + 1) for n in range(rows)]
        for n, binding in enumerate(self.bindings):
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self.logits[: n + 1]))

    def bind(self, first: int, end: int) -> ort.IOBinding:
        """Rows first .. end-1 of the cache, as past and as present."""
        binding = self.session.io_binding()
        for part, buffer in self.cache.items():
            value = ort.OrtValue.ortvalue_from_numpy(buffer[first:end])
            binding.bind_ortvalue_input(PAST + part, value)
            binding.bind_ortvalue_output(f"present.{part}", value)
        return binding

    def prefill(self, row: int, ids: Array, done: int) -> Array:
        """Logits [vocab] after the tokens `ids`, which follow `done` others in `row`."""
        end = done + len(ids)
        binding = self.bind(row, row + 1)
        binding.bind_output("logits")  # of how many tokens is the model's choice
        self.run(binding, ids[None], np.ones((1, end), np.int64), np.arange(done, end)[None])
        logits: Array = binding.get_outputs()[-1].numpy()[0, -1]
        return logits

    def decode(self, ids: Array, done: Array) -> Array:
        """Logits [rows, vocab] after one more token in each of the first rows, which hold `done` tokens.

        They lie in a buffer that the next step overwrites.
        """
        mask = np.arange(done.max() + 1) <= done[:, None]
        self.run(self.bindings[len(ids) - 1], ids[:, None], mask, done[:, None])
        return self.logits[: len(ids), 0]

    def run(self, binding: ort.IOBinding, ids: Array, mask: Array, positions: Array) -> None:
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        arrays = {name: np.ascontiguousarray(value, np.int64) for name, value in feeds.items()}
        for name, value in arrays.items():
            binding.bind_cpu_input(name, value)  # does not copy: `arrays` lives until the run is over
        self.session.run_with_iobinding(binding)

    def move(self, source: int, target: int, length: int) -> None:
        """Row `target` becomes what `source` is: its first `length` tokens."""
        for buffer in self.cache.values():
            buffer[target, :, :length] = buffer[source, :, :length]

    def close(self) -> None:
        del self.bindings, self.cache, self.session


class ConcatEngine:
    """For models whose present is a longer copy of past (`--portable`): a step runs its rows one after the other."""

    def __init__(
        self,
        model: Path,
        rows: int,
        length: int,
        threads: int = 0,
        spinning: bool | None = None,
        libraries: Sequence[Path] = (),
    ) -> None:
        del length  # a cache is as long as its sequence
        self.session = open_session(model, threads, spinning, libraries)
        self.empty = {
            PAST + part: ort.OrtValue.ortvalue_from_numpy(b) for part, b in empty_cache(self.session, 1, 0).items()
        }
        self.outputs = ["logits", *(f"present.{name.removeprefix(PAST)}" for name in self.empty)]
        self.caches = [self.empty] * rows

    def prefill(self, row: int, ids: Array, done: int) -> Array:
        """Logits [vocab] after the tokens `ids`, which follow `done` others in `row`."""
        end = done + len(ids)
        feeds = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(done, end, dtype=np.int64)[None],
        }
        values = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
        past = self.caches[row] if done else self.empty
        logits, *present = self.session.run_with_ort_values(self.outputs, values | past)
        self.caches[row] = dict(zip(self.empty, present, strict=True))
        last: Array = logits.numpy()[0, -1]
        return last

    def decode(self, ids: Array, done: Array) -> Array:
        """Logits [rows, vocab] after one more token in each of the first rows, which hold `done` tokens."""
        return np.stack([self.prefill(row, ids[row : row + 1], int(done[row])) for row in range(len(ids))])

    def move(self, source: int, target: int, length: int) -> None:
        """Row `target` becomes what `source` is."""
        del length
        self.caches[target] = self.caches[source]

    def close(self) -> None:
        del self.caches, self.empty, self.session


ENGINES: dict[str, type[SharedEngine] | type[ConcatEngine]] = {"shared": SharedEngine, "concat": ConcatEngine}
