"""A causal LM on ONNX Runtime with its KV cache in place: row r of every buffer belongs to the sequence in row r.

row 0   |##########......|     rows of different lengths decode together; attention_mask says how long each is
row 1   |####............|     a new sequence is prefilled alone, right in its row
row 2   |#######.........|     rows 0 .. n-1 are in use, so the batch is a prefix of the buffer, never a copy
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Array = npt.NDArray[Any]
PAST = "past_key_values."


def open_session(model: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle cores belong to others
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def empty_cache(session: ort.InferenceSession, rows: int, length: int) -> dict[str, Array]:
    """A buffer [rows, heads, length, dim] for each `i.key` and `i.value`."""
    shapes = {i.name: i.shape for i in session.get_inputs() if i.name.startswith(PAST)}
    return {
        name.removeprefix(PAST): np.zeros((rows, heads, length, dim), np.float32)
        for name, (_, heads, _, dim) in shapes.items()
    }


class SharedEngine:
    """`rows` sequences of at most `length` tokens; pages of the cache take memory when they are first written."""

    def __init__(self, model: Path, rows: int, length: int, threads: int = 0) -> None:
        self.session = open_session(model, threads)
        self.cache = empty_cache(self.session, rows, length)
        self.bindings = [self.bind(0, n + 1) for n in range(rows)]

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
        positions = np.arange(done, end, dtype=np.int64)
        binding = self.bind(row, row + 1)
        logits: Array = self.run(binding, ids[None], np.ones((1, end), np.int64), positions[None])[0]
        return logits

    def decode(self, ids: Array, done: Array) -> Array:
        """Logits [rows, vocab] after one more token in each of the first rows, which hold `done` tokens."""
        mask = (np.arange(done.max() + 1) <= done[:, None]).astype(np.int64)
        return self.run(self.bindings[len(ids) - 1], ids[:, None], mask, done[:, None])

    def run(self, binding: ort.IOBinding, ids: Array, mask: Array, positions: Array) -> Array:
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        arrays = {name: np.ascontiguousarray(value, np.int64) for name, value in feeds.items()}
        for name, value in arrays.items():
            binding.bind_cpu_input(name, value)  # does not copy: `arrays` lives until the run is over
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        logits: Array = binding.get_outputs()[-1].numpy()
        return logits[:, -1]

    def move(self, source: int, target: int, length: int) -> None:
        """Row `target` becomes what `source` is: its first `length` tokens."""
        for buffer in self.cache.values():
            buffer[target, :, :length] = buffer[source, :, :length]

    def close(self) -> None:
        del self.bindings, self.cache, self.session


class ConcatEngine:
    """For models whose present is a longer copy of past (`--portable`): a step runs its rows one after the other."""

    def __init__(self, model: Path, rows: int, length: int, threads: int = 0) -> None:
        del length  # a cache is as long as its sequence
        self.session = open_session(model, threads)
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
