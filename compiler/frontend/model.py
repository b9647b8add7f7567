"""What a frontend hands to the pipeline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.frontend.merged import MergedTensor
from instantrt.passes.core.lazy import FileTensor, InMemory, view_of

if TYPE_CHECKING:  # whose code is not in the key of earlier exports, as this module is
    from instantrt.compiler.quant.stored import Reader

OPSET = 23  # with the operators that passes fuse


@dataclass(frozen=True)
class LlmShape:
    """The sizes that a causal LM's interface is made of."""

    layers: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_length: int = 0  # positions the model was made for; 0 where it does not say

    # Where the interface's dynamic sizes are read: their names -> an input, and its axis.
    DIMENSIONS: ClassVar[Mapping[str, tuple[str, int]]] = {
        "batch": ("input_ids", 0),
        "sequence": ("input_ids", 1),
        "total": ("attention_mask", 1),
        "past": ("past_key_values.0.key", 2),
    }

    def with_layers(self, count: int) -> LlmShape:
        return replace(self, layers=count)

    def input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "position_ids", *self.cache_names("past_key_values")]

    def output_names(self) -> list[str]:
        return ["logits", *self.cache_names("present")]

    def cache_names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{i}.{part}" for i in range(self.layers) for part in ("key", "value")]


# What a model without a cache is for -> the output that it has.
OUTPUTS = {
    "embed": "sentence_embedding",
    "hidden": "last_hidden_state",
    "classify": "logits",
    "classify_tokens": "logits",
    "fill_mask": "logits",
}
CLASSIFIERS = ("classify", "classify_tokens")  # tasks whose outputs have labels


@dataclass(frozen=True)
class EncoderShape:
    """The sizes that the interface of a model without a cache is made of: an encoder, or a decoder that only reads.

    task          of `OUTPUTS`
    width         numbers in the last axis of its output
    max_length    tokens that a text may have; 0 where it does not say
    token_types   does it take token_type_ids?
    """

    task: str
    layers: int
    vocab: int
    width: int
    max_length: int = 0
    token_types: bool = False

    DIMENSIONS: ClassVar[Mapping[str, tuple[str, int]]] = {"batch": ("input_ids", 0), "sequence": ("input_ids", 1)}

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> EncoderShape:
        """As a manifest has it, beside what it says of texts."""
        return cls(**{each.name: said[each.name] for each in fields(cls)})

    def with_layers(self, count: int) -> EncoderShape:
        return replace(self, layers=count)

    def input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *(["token_type_ids"] if self.token_types else [])]

    def output_names(self) -> list[str]:
        return [OUTPUTS[self.task]]


Interface: TypeAlias = LlmShape | EncoderShape


@dataclass(frozen=True)
class FloatModel:
    """A FLOAT graph with lazy weights, and where it came from.

    `tensors` is the whole checkpoint, of which `reader` reads what is quantized; None: nothing is. `llm` is the
    interface of a causal LM, `encoder` that of a model without a cache; a plain ONNX file has neither. `text` is how
    texts are prepared for an encoder, and what its labels are called.
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
    encoder: EncoderShape | None = None
    text: Mapping[str, Any] = field(default_factory=dict)
    reader: Reader | None = None

    @property
    def longest(self) -> int:
        """Tokens that the model was made for; 0 where nothing says it."""
        interface = self.llm or self.encoder
        return interface.max_length if interface is not None else 0


def stored_types(graph: gs.Graph) -> Mapping[np.dtype[Any], int]:
    """Bytes of a new graph's float weights by the type they are stored in, of one with an adapter in its base."""
    sizes: Counter[np.dtype[Any]] = Counter()
    for tensor in graph.tensors().values():
        view = view_of(tensor)
        if view is not None and view.dtype == np.float32 and isinstance(view.source, FileTensor | InMemory):
            source = view.source.base if isinstance(view.source, MergedTensor) else view.source
            sizes[source.dtype] += math.prod(view.shape) * source.dtype.itemsize
    return sizes
