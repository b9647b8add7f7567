"""What must hold between the stages of the pipeline; an ill-formed graph is caught at a boundary, not in a backend.

Names in quotes are headings of docs/facts.md, where what was measured stands.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Missing, view_of
from instantrt.passes.core.linear import weight_dequantize
from instantrt.passes.core.rewrite import Rule, check, producer

QDQ_OPS = ("QuantizeLinear", "DequantizeLinear")
STORES = ("Concat", "TensorScatter", "Reshape")  # where the codes of a cache go: it is written once and read later


class Stage(Enum):
    FLOAT = "float"
    QDQ = "canonical Q/DQ"
    ONNXRUNTIME = "lowered for ONNX Runtime"
    TENSORRT = "lowered for TensorRT"


def verify(graph: gs.Graph, stage: Stage) -> None:
    """Raises on the first rule that a node breaks: a bug of ours, except for weights that a checkpoint lacks."""
    for tensor in graph.tensors().values():
        view = view_of(tensor)
        if stage is not Stage.FLOAT and view is not None and isinstance(view.source, Missing):
            next(iter(view.source.tiles()))
    check(graph, RULES[stage], f"stage '{stage.value}' ensures")


def no_qdq(node: gs.Node) -> str | None:
    return "quantization is not expected here" if node.op in QDQ_OPS else None


def weight_dq_feeds_matmul(node: gs.Node) -> str | None:
    if node.op != "DequantizeLinear" or not isinstance(node.inputs[0], gs.Constant):
        return None
    weight = node.outputs[0]
    while len(weight.outputs) == 1 and weight.outputs[0].op in ("Add", "Reshape"):
        weight = weight.outputs[0].outputs[0]
    users = weight.outputs
    made = all(u.op == "MatMul" and u.inputs[1] is weight and weight_dequantize(weight) is node for u in users)
    return None if users and made else "no MatMul's weight"


def activations_are_float(node: gs.Node) -> str | None:
    return "activations are quantized" if node.op == "QuantizeLinear" else None


def tables_are_float32(node: gs.Node) -> str | None:
    """A table that was narrowed before looks like one whose rows are float16, and would be read as such."""
    view = view_of(node.inputs[0]) if node.op == "Gather" else None
    return None if view is None or view.dtype == np.float32 else f"its table is {view.dtype}"


def activation_q_is_followed_by_dq(node: gs.Node) -> str | None:
    if node.op != "QuantizeLinear":
        return None
    users = node.outputs[0].outputs
    kept = users and all(u.op in ("DequantizeLinear", *STORES) for u in users)
    return None if kept else "codes leave the Q/DQ pair"


def no_weight_dequantize(node: gs.Node) -> str | None:
    """ONNX Runtime may turn DequantizeLinear + MatMul into int8-activation kernels: explicit operators only.

    "DQ + MatMul on a CPU"
    """
    weight = weight_dequantize(node.inputs[1]) if node.op == "MatMul" else None
    return "a dequantized weight feeds a MatMul" if weight is not None else None


def signed_and_symmetric(node: gs.Node) -> str | None:
    """TensorRT takes neither unsigned codes nor zero points: "Zero points and unsigned codes"."""
    if node.op not in QDQ_OPS:
        return None
    codes = node.inputs[0] if node.op == "DequantizeLinear" else node.outputs[0]
    if codes.dtype is not None and np.dtype(codes.dtype).name in ("uint8", "uint4"):
        return "unsigned codes"
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return "a zero point" if zero is not None and (view_of(zero) is not None or zero.values.any()) else None


def scale_is_constant(node: gs.Node) -> str | None:
    """TensorRT-RTX ends the process over some scales that are not: "Scales computed at run time"."""
    if node.op not in QDQ_OPS:
        return None
    return None if isinstance(node.inputs[1], gs.Constant) else "a scale computed at run time"


def int8_product_is_by_tensor(node: gs.Node) -> str | None:
    """An int8 product takes one weight scale. TensorRT reads block scales as if they were a channel's, without a word;
    a channel's it multiplies too late, after the unscaled sums were written as float16: "int8 tokens and block scales".
    """
    x, w = (producer(t, "DequantizeLinear") for t in node.inputs) if node.op == "MatMul" else (None, None)
    if x is None or w is None or isinstance(x.inputs[0], gs.Constant):
        return None
    return None if np.prod(w.inputs[1].shape) == 1 else "quantized activations meet a weight with several scales"


def attention_is_explicit(node: gs.Node) -> str | None:
    """TensorRT aligns a causal mask to the upper left even with a cache, and ignores the lengths of input 6.

    "Attention in TensorRT"
    """
    if node.op != "Attention":
        return None
    if node.attrs.get("is_causal") or len(node.inputs) < 4 or not node.inputs[3].name:
        return "the mask is not explicit"
    if len(node.outputs) != 1 or any(t.name for t in node.inputs[4:]):
        return "a cache or lengths inside the node"
    return None


RULES: dict[Stage, tuple[Rule, ...]] = {
    Stage.FLOAT: (no_qdq,),
    Stage.QDQ: (weight_dq_feeds_matmul, activation_q_is_followed_by_dq),
    Stage.ONNXRUNTIME: (no_weight_dequantize,),
    Stage.TENSORRT: (signed_and_symmetric, scale_is_constant, int8_product_is_by_tensor, attention_is_explicit),
}
