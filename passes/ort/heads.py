"""Heads [B, H, S, D] and rows [B, S, H*D] of attention: moved from one to the other, or found where they came from."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import small
from instantrt.passes.core.rewrite import add, producer

SPLIT, KEYS = [0, 2, 1, 3], [0, 3, 1, 2]  # [B, H, S, D] <-> [B, S, H, D];  [B, H, D, T] -> [B, T, H, D]


def in_rows(graph: gs.Graph, heads: gs.Tensor, order: list[int], name: str) -> gs.Tensor:
    """[B, S, H*D] of heads whose axes `order` has as [B, S, H, D]; undoes how they were made of such rows."""
    while turned := producer(heads, "Transpose"):
        heads, order = turned.inputs[0], [turned.attrs["perm"][axis] for axis in order]
    split = producer(heads, "Reshape") if order == sorted(order) else None
    whole, parts = (split.inputs[0].shape, heads.shape) if split is not None else (None, None)
    if split is not None and whole and parts and whole == [*parts[:2], math.prod(parts[2:])]:
        return split.inputs[0]
    if order != sorted(order):
        heads = add(graph, "Transpose", [heads], f"{name}/turned", perm=order)
    return joined(graph, heads, name)


def joins(heads: gs.Tensor) -> list[gs.Node]:
    """The Reshapes of heads [B, S, H, D]."""
    turned = (user for user in heads.outputs if user.op == "Transpose" and user.attrs["perm"] == SPLIT)
    return [user for node in turned for user in node.outputs[0].outputs if user.op == "Reshape"]


def rows(graph: gs.Graph, heads: gs.Tensor, name: str) -> gs.Tensor:
    """[B, H, S, D] -> [B, S, H*D]; undoes a head split where that is all that happened, rotary embedding included."""
    rotary = producer(heads, "RotaryEmbedding")
    split = producer(rotary.inputs[0] if rotary else heads, "Transpose")
    if split is None or split.attrs.get("perm") != SPLIT:
        turned = add(graph, "Transpose", [heads], f"{name}/turned", perm=SPLIT)
        return joined(graph, turned, name)
    reshape = producer(split.inputs[0], "Reshape")
    whole = reshape is not None and reshape.inputs[0].shape is not None and len(reshape.inputs[0].shape) == 3
    x = reshape.inputs[0] if reshape is not None and whole else joined(graph, split.inputs[0], name)
    if rotary is None:
        return x
    attrs = {**rotary.attrs, "num_heads": heads.shape[1]}
    return add(graph, "RotaryEmbedding", [x, *rotary.inputs[1:]], f"{name}/rotated", **attrs)


def joined(graph: gs.Graph, heads: gs.Tensor, name: str) -> gs.Tensor:
    """[B, S, H, D] -> [B, S, H*D]."""
    return add(graph, "Reshape", [heads, small(f"{name}/shape", [0, 0, -1], np.int64)], f"{name}/rows")
