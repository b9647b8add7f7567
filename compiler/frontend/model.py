"""What a frontend hands to the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from passes.lazy import FileTensor


@dataclass(frozen=True)
class LlmShape:
    """The sizes that a causal LM's interface is made of."""

    layers: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_length: int = 0  # positions the model was made for; 0 where it does not say

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
    `files` are those that decide what the artifacts hold.
    """

    graph: gs.Graph
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, FileTensor]
    llm: LlmShape | None
    files: tuple[Path, ...] = ()
