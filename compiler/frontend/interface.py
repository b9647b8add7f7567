"""A transformers model as a function of tensors: what is exported, and the inputs that it is exported with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import Cache, DynamicLayer

from instantrt.compiler.frontend.model import OUTPUTS, EncoderShape, Interface, LlmShape
from instantrt.compiler.frontend.sentence_modules import pooled

Tensor: TypeAlias = torch.Tensor
Past: TypeAlias = Sequence[tuple[Tensor, Tensor]]
BATCH, SEQUENCE, PAST = 2, 3, 5  # any sizes that are not 0 or 1, which the exporter would specialise


def wrapped(model: torch.nn.Module, shape: Interface) -> torch.nn.Module:
    """The model as a function of tokens, and of the past where it has one: (output, present)."""
    return WithCache(model) if isinstance(shape, LlmShape) else WithoutCache(model, shape)


def example(shape: Interface) -> tuple[Any, ...]:
    """Inputs of a wrapped model: its tokens, in the order of `input_names`; with a cache, the past of each layer."""
    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    if isinstance(shape, EncoderShape):
        return ids, torch.ones_like(ids), *([torch.zeros_like(ids)] if shape.token_types else [])
    keys = (BATCH, shape.kv_heads, PAST, shape.head_dim)
    return (
        ids,
        torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64),
        torch.arange(PAST, PAST + SEQUENCE).expand(BATCH, SEQUENCE),
        [(torch.zeros(keys), torch.zeros(keys)) for _ in range(shape.layers)],
    )


def dynamic(shape: Interface) -> tuple[Any, ...]:
    """Which axes of `example` are of any size."""
    dims = {name: torch.export.Dim(name) for name in shape.DIMENSIONS}
    tokens = {0: dims["batch"], 1: dims["sequence"]}
    if isinstance(shape, EncoderShape):
        tokens[1] = torch.export.Dim("sequence", max=shape.max_length or None)  # a table of positions ends there
        return tuple(tokens for _ in shape.input_names())
    kv = {0: dims["batch"], 2: dims["past"]}
    return tokens, {0: dims["batch"], 1: dims["total"]}, tokens, [(kv, kv)] * shape.layers


class PastLayer(DynamicLayer):
    """A layer of the cache that starts with the past it is given."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return int(self.keys.shape[-2]) if isinstance(self.keys.shape[-2], int) else self.keys.shape[-2]


class WithCache(torch.nn.Module):
    """The model with its cache as plain tensors: (ids, mask, positions, past) -> (logits, present)."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        cache = Cache(layers=[PastLayer(keys, values) for keys, values in past])
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, [(layer.keys, layer.values) for layer in cache.layers]


class WithoutCache(torch.nn.Module):
    """The model that only reads: (ids, mask, token types where it has them) -> (output, no present)."""

    def __init__(self, model: torch.nn.Module, shape: EncoderShape) -> None:
        super().__init__()
        self.model, self.task = model, shape.task

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        if self.task == "embed":
            return pooled(self.model, output.last_hidden_state, attention_mask), []
        return output[OUTPUTS[self.task]], []
