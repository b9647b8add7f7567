"""The rest of an LLM graph for ONNX Runtime's CPU provider: attention with a shared cache, 16-bit tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from passes.lazy import FileTensor, View, first_part, small, view_of
from passes.linear import Linear, linear
from passes.lower_ort_linear import BLOCKS
from passes.quant import InstantQuant, QuantTensor
from passes.rewrite import Reject, Rewrite, add, producer, take_over

HALF_TYPES = {np.dtype(np.float16): onnx.TensorProto.FLOAT16, np.dtype(ml_dtypes.bfloat16): onnx.TensorProto.BFLOAT16}


@dataclass(frozen=True)
class AttentionMatch:
    node: gs.Node
    query: gs.Tensor
    key: gs.Tensor
    value: gs.Tensor
    past_key: gs.Tensor
    past_value: gs.Tensor
    present_key: gs.Tensor
    present_value: gs.Tensor
    mask: gs.Tensor
    heads: int
    kv_heads: int
    head_dim: int


class LowerToGroupQueryAttention(Rewrite[AttentionMatch]):
    """Attention(q, Concat(past, k), Concat(past, v), mask) -> com.microsoft.GroupQueryAttention.

    Before: present_k = Concat(past_k, k); y [B, H, S, D] = Attention(q, present_k, present_v, mask [B, 1, S, T])
    After:  y [B, S, H*D], present_k, present_v = GroupQueryAttention(q, k, v, past_k, past_v, last, T, mask)

    Lengths come from the mask alone, row by row, so past and present may be one buffer of the maximum length (no copy
    of the cache at decode), or grow by each call as the interface says.
    """

    def match(self, node: gs.Node) -> AttentionMatch | Reject | None:
        if node.op != "Attention":
            return None
        if len(node.inputs) != 4 or len(node.outputs) != 1:
            return Reject("attention without an explicit mask, or with its own cache")
        query, keys, values, mask = node.inputs
        concat_k, concat_v = producer(keys, "Concat"), producer(values, "Concat")
        if concat_k is None or concat_v is None:
            return Reject("keys and values are not the concatenation of a cache and new ones")
        heads, head_dim, kv_heads = query.shape[1], query.shape[3], keys.shape[1]
        if not all(isinstance(d, int) for d in (heads, head_dim, kv_heads)):
            return Reject("the number of heads is not a constant")
        past_k, k = concat_k.inputs
        past_v, v = concat_v.inputs
        return AttentionMatch(node, query, k, v, past_k, past_v, keys, values, mask, heads, kv_heads, head_dim)

    def rewrite(self, graph: gs.Graph, match: AttentionMatch) -> None:
        node = match.node
        out = take_over(node)
        for tensor in (match.present_key, match.present_value):
            tensor.inputs.clear()
        total, last = lengths(graph, match.mask)
        q, k, v = (
            rows(graph, t, f"{node.name}/{part}")
            for t, part in zip((match.query, match.key, match.value), "qkv", strict=True)
        )
        y = gs.Variable(f"{node.name}/y", np.dtype(np.float32), ["batch", "sequence", match.heads * match.head_dim])
        nothing = gs.Variable.empty()
        inputs = [q, k, v, match.past_key, match.past_value, last, total, nothing, nothing, nothing, match.mask]
        attrs = {"num_heads": match.heads, "kv_num_heads": match.kv_heads, "scale": float(node.attrs["scale"])}
        outputs = [y, match.present_key, match.present_value]
        graph.nodes.append(gs.Node("GroupQueryAttention", node.name, attrs, inputs, outputs, domain="com.microsoft"))
        shape = small(f"{node.name}/heads", [0, 0, match.heads, match.head_dim], np.int64)
        split = add(graph, "Reshape", [y, shape], f"{node.name}/y_heads")
        add(graph, "Transpose", [split], out, perm=[0, 2, 1, 3])


def lengths(graph: gs.Graph, mask: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
    """(total length int32 scalar, each row's length less one int32 [B]) of a mask [B, 1, S, T], made once for a mask.

    A row ends at the last key that its last query sees. Rows padded on the left all end at T. Rows padded on the right
    end where they end, so sequences of different lengths decode in one batch, each in its own place in the cache.
    """
    prefix = f"{mask.name}/lengths"
    tensors = {t.name: t for n in graph.nodes if n.name.startswith(prefix) for t in n.outputs}
    if f"{prefix}/last" in tensors:
        return tensors[f"{prefix}/total"], tensors[f"{prefix}/last"]
    one = add(graph, "Shape", [mask], f"{prefix}/t", start=3, end=4)
    scalar = add(graph, "Squeeze", [one], f"{prefix}/scalar")
    total = add(graph, "Cast", [scalar], f"{prefix}/total", to=onnx.TensorProto.INT32)
    query = add(graph, "Gather", [mask, small(f"{prefix}/query", -1, np.int64)], f"{prefix}/seen", axis=2)
    key = add(graph, "ArgMax", [query], f"{prefix}/key", axis=2, keepdims=0, select_last_index=1)
    row = add(graph, "Reshape", [key, small(f"{prefix}/row", [-1], np.int64)], f"{prefix}/rows")
    return total, add(graph, "Cast", [row], f"{prefix}/last", to=onnx.TensorProto.INT32)


def rows(graph: gs.Graph, heads: gs.Tensor, name: str) -> gs.Tensor:
    """[B, H, S, D] -> [B, S, H*D]; undoes a head split where that is all that happened, rotary embedding included."""
    rotary = producer(heads, "RotaryEmbedding")
    split = producer(rotary.inputs[0] if rotary else heads, "Transpose")
    reshape = producer(split.inputs[0], "Reshape") if split and split.attrs["perm"] == [0, 2, 1, 3] else None
    if reshape is None or reshape.inputs[0].shape is None or len(reshape.inputs[0].shape) != 3:
        turned = add(graph, "Transpose", [heads], f"{name}/turned", perm=[0, 2, 1, 3])
        return add(graph, "Reshape", [turned, small(f"{name}/shape", [0, 0, -1], np.int64)], f"{name}/rows")
    if rotary is None:
        return reshape.inputs[0]
    attrs = {**rotary.attrs, "num_heads": heads.shape[1]}
    return add(graph, "RotaryEmbedding", [reshape.inputs[0], *rotary.inputs[1:]], f"{name}/rotated", **attrs)


class MergeHeads(Rewrite[gs.Node]):
    """Reshape(Transpose(Transpose(Reshape(y [B, S, H*D])))) -> y, left by the attention lowering."""

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        turned = producer(node.inputs[0], "Transpose") if node.op == "Reshape" else None
        back = producer(turned.inputs[0], "Transpose") if turned else None
        split = producer(back.inputs[0], "Reshape") if back else None
        same = split is not None and split.inputs[0].shape is not None and node.outputs[0].shape is not None
        if turned is None or back is None or split is None or not same:
            return None
        undone = turned.attrs["perm"] == back.attrs["perm"] == [0, 2, 1, 3]
        last = (split.inputs[0].shape[-1], node.outputs[0].shape[-1])
        return node if undone and len(node.outputs[0].shape) == 3 and last[0] == last[1] else None

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        y = match.i().i().i().inputs[0]
        add(graph, "Identity", [y], take_over(match))


@dataclass(frozen=True)
class TableMatch:
    node: gs.Node
    table: gs.Constant
    stored: FileTensor


class KeepTablesInHalf(Rewrite[TableMatch]):
    """Gather(table float32) -> Cast(Gather(table as stored)): a 16-bit embedding keeps its bytes."""

    def match(self, node: gs.Node) -> TableMatch | Reject | None:
        view = view_of(node.inputs[0]) if node.op == "Gather" else None
        if view is None or view.dtype != np.float32 or not isinstance(view.source, FileTensor):
            return None
        if view.source.dtype not in HALF_TYPES or view.source.shape != view.shape:
            return Reject("the table is not stored in 16 bits")
        return TableMatch(node, node.inputs[0], view.source)

    def rewrite(self, graph: gs.Graph, match: TableMatch) -> None:
        match.table.values = View(match.stored, match.stored.shape, match.stored.dtype)
        out = take_over(match.node)
        taken = gs.Variable(f"{out.name}/half", HALF_TYPES[match.stored.dtype], out.shape)
        match.node.outputs.append(taken)
        add(graph, "Cast", [taken], out, to=onnx.TensorProto.FLOAT)


@dataclass(frozen=True)
class FloatLinearMatch:
    linear: Linear
    stored: FileTensor


def holds_table(tensor: gs.Tensor, stored: FileTensor) -> bool:
    """Is `tensor` the stored matrix as it is (an embedding), not a linear's [K, N] view of it?"""
    view = view_of(tensor)
    return view is not None and view.source == stored and view.project is first_part


@dataclass(frozen=True)
class KeepFloatLinearsInHalf(Rewrite[FloatLinearMatch]):
    """MatMul(x, W float32) -> MatMul(x, Cast(W as stored)) for linears left float; a tied head shares the embedding.

    ONNX Runtime folds the Cast once when it loads; the file stays half as large.
    """

    def match(self, node: gs.Node) -> FloatLinearMatch | Reject | None:
        found = linear(node)
        if found is None or not isinstance(found.rows, FileTensor) or found.rows.dtype not in HALF_TYPES:
            return None
        return FloatLinearMatch(found, found.rows)

    def rewrite(self, graph: gs.Graph, match: FloatLinearMatch) -> None:
        stored, node = match.stored, match.linear.node
        tied = next((t for t in graph.tensors().values() if holds_table(t, stored)), None)
        if tied is not None:
            half = add(graph, "Transpose", [tied], f"{match.linear.path}/tied", perm=[1, 0])
        else:
            k_n = View(stored, stored.shape[::-1], stored.dtype, axis=1, project=lambda t: t.parts[0].T)
            half = gs.Constant(f"{match.linear.path}.weight_half", k_n)
        node.inputs[1] = add(graph, "Cast", [half], f"{match.linear.path}/weight", to=onnx.TensorProto.FLOAT)


@dataclass(frozen=True)
class EmbeddingMatch:
    node: gs.Node
    table: gs.Constant
    quant: QuantTensor


class QuantizeTables(Rewrite[EmbeddingMatch]):
    """Gather(table [V, H], ids) -> com.microsoft.GatherBlockQuantized, 8 bits, asymmetric, in blocks along H."""

    def match(self, node: gs.Node) -> EmbeddingMatch | Reject | None:
        view = view_of(node.inputs[0]) if node.op == "Gather" and node.attrs.get("axis", 0) == 0 else None
        if view is None or len(view.shape) != 2:
            return None
        v, h = view.shape
        block = next((b for b in BLOCKS[1:] if h % b == 0), None)
        if block is None:
            return Reject(f"width {h} is no multiple of 16")
        name = node.inputs[0].name
        source = InstantQuant(name, view.source, 8, block, False, np.dtype(np.float32))
        return EmbeddingMatch(
            node, node.inputs[0], QuantTensor(name, source, (v, h), 8, block, False, np.dtype(np.float32))
        )

    def rewrite(self, graph: gs.Graph, match: EmbeddingMatch) -> None:
        q, node = match.quant, match.node
        v, h = q.shape
        inputs = [
            gs.Constant(f"{q.name}.codes", View(q, (v, h), np.uint8)),
            node.inputs[1],
            gs.Constant(f"{q.name}.scales", View(q, (v, q.groups), np.float32, project=lambda t: t.parts[1])),
            gs.Constant(f"{q.name}.zeros", View(q, (v, q.groups), np.uint8, project=lambda t: t.parts[2])),
        ]
        attrs = {"bits": 8, "block_size": q.group_size, "gather_axis": 0, "quantize_axis": 1}
        add(graph, "GatherBlockQuantized", inputs, take_over(node), domain="com.microsoft", name=node.name, **attrs)

    def note(self, match: EmbeddingMatch) -> str:
        return f"{match.quant} -> GatherBlockQuantized"


ATTENTION: tuple[Rewrite[Any], ...] = (LowerToGroupQueryAttention(), MergeHeads())


def tables_as_stored() -> tuple[Rewrite[Any], ...]:
    """Embeddings first, so that a tied head finds the table it shares."""
    return (KeepTablesInHalf(), KeepFloatLinearsInHalf())
