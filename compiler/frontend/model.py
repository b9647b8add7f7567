"""What a frontend hands to the pipeline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FileTensor, InMemory, view_of

OPSET = 23  # with the operators that passes fuse


@dataclass(frozen=True)
class LlmShape:
    """The sizes that a causal LM's interface is made of."""

    layers: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_length: int = 0  # positions the model was made for; 0 where it does not say

    def with_layers(self, count: int) -> LlmShape:
        return replace(self, layers=count)

    def input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "position_ids", *self.cache_names("past_key_values")]

    def output_names(self) -> list[str]:
        return ["logits", *self.cache_names("present")]

    def cache_names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{i}.{part}" for i in range(self.layers) for part in ("key", "value")]


@dataclass(frozen=True)
class FloatModel:
    """A FLOAT graph with lazy weights, and where it came from.

    `tensors` is the whole checkpoint (a reader of quantized weights looks there); `llm` is None for a plain ONNX file.
    `files` are those that decide what the artifacts hold; `types` are the bytes of its weights by the type they have
    there, as far as they are not quantized; `notes` are what a user should know of how it was read. `head` is the path
    of the module that makes the logits, where the model itself names one; `account` says what became of each tensor
    and file of a folder, in JSON. `held` keeps a folder there that was made for the model;
    `adapter` is the folder of one that is merged into its weights.
    """

    graph: gs.Graph
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, FileTensor]
    llm: LlmShape | None
    files: tuple[Path, ...] = ()
    types: Mapping[np.dtype[Any], int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    head: str | None = None
    account: Mapping[str, Any] = field(default_factory=dict)
    held: Any = None
    adapter: Path | None = None


def stored_types(graph: gs.Graph) -> Mapping[np.dtype[Any], int]:
    """Bytes of a new graph's float weights by the type they are stored in."""
    sizes: Counter[np.dtype[Any]] = Counter()
    for tensor in graph.tensors().values():
        view = view_of(tensor)
        if view is not None and view.dtype == np.float32 and isinstance(view.source, FileTensor | InMemory):
            sizes[view.source.dtype] += math.prod(view.shape) * view.source.dtype.itemsize
    return sizes
