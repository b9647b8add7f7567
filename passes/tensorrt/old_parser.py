"""What the ONNX parser of TensorRT 10.0 to 10.4, the last for Volta, takes: as data, and checked before a build.

Source: docs/operators.md and the importers of the open parser, onnx-tensorrt 10.0 and 10.1; of 10.2 to 10.4 it is
assumed that they take no less. The document says opset 9 to 20. The importers only ask for 13 or more here and 19
there, and int4, which they take since 10.0, is not in ONNX before 21: that is what the graph is written as. They infer
blocks from the shape of the scales and read no `block_size` (docs/facts.md, "The parser of TensorRT 10.0 to 10.4").
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import onnx_graphsurgeon as gs

from instantrt.passes.core.evaluate_node import numpy_type
from instantrt.passes.core.subgraphs import every_node
from instantrt.passes.tensorrt.explicit_scales import INT4_BLOCKS
from instantrt.plugins.ops import DOMAIN

OLD_OPSET = 21

FLOATS = frozenset({"float32", "float16"})  # and bfloat16, which no GPU has that these releases are for
NUMBERS = FLOATS | {"int32", "int64"}
ANY = NUMBERS | {"bool"}
BY_TYPES = (
    (
        FLOATS,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh "
        "CumSum Dropout Einsum Elu Erf Exp Floor GRU Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool "
        "GroupNormalization HardSigmoid HardSwish Hardmax InstanceNormalization IsInf LRN LSTM LayerNormalization "
        "LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool Mean MeanVarianceNormalization Mish PRelu Pow "
        "QuantizeLinear RNN Reciprocal Resize Round Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh "
        "ThresholdedRelu Upsample",
    ),
    (
        NUMBERS,
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul "
        "Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
        "ReduceSum ReduceSumSquare Relu ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK",
    ),
    (
        ANY,
        "Cast CastLike Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity "
        "If Loop OneHot Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    (frozenset({"bool"}), "And Not Or Xor"),
    (frozenset({"int8", "int4"}), "DequantizeLinear"),
)
TYPES = {op: types for types, ops in BY_TYPES for op in ops.split()}
DATA = {"Where": 1}  # the input whose type counts, where it is not the first
# Inputs that the importers read while they parse.
CONSTANT = {"CumSum": 1, "OneHot": 1, "Pad": 3, "Slice": 3, "Split": 1, "Squeeze": 1, "Unsqueeze": 1}
CONSTANT |= {op: 1 for op in TYPES if op.startswith("Reduce")}


def unsupported(graph: gs.Graph) -> Iterator[tuple[gs.Node, str]]:
    """Every node of `graph` and its subgraphs that the parser refuses, with the reason."""
    for node in every_node(graph):
        problem = problem_of(node)
        if problem:
            yield node, problem


def problem_of(node: gs.Node) -> str:
    """Why the parser refuses `node`, or nothing; a tensor of unknown type is taken to be of a good one."""
    if node.domain == DOMAIN:  # a node that the parser does not know is looked for among the plugins
        return ""
    types = TYPES.get(node.op)
    if types is None or node.domain not in (None, "", "ai.onnx"):
        return "has no such operator"
    data = node.inputs[DATA.get(node.op, 0)] if node.inputs else None
    if data is not None and data.dtype is not None and numpy_type(data.dtype).name not in types:
        return f"takes {', '.join(sorted(types))} here, not {numpy_type(data.dtype).name}"
    fixed = node.inputs[CONSTANT[node.op]] if node.op in CONSTANT and len(node.inputs) > CONSTANT[node.op] else None
    if fixed is not None and fixed.name and not isinstance(fixed, gs.Constant):
        return f"wants a constant as input {CONSTANT[node.op]}"
    return int4_problem(node) if data is not None and data.dtype == ml_dtypes.int4 else ""


def int4_problem(node: gs.Node) -> str:
    """int4 goes two in a byte, along N, and has one scale a block of 64 or 128."""
    if node.inputs[0].shape[-1] % 2:
        return "takes int4 with an even number of outputs only"
    block = node.attrs.get("block_size", 0)
    return "" if block in INT4_BLOCKS else f"takes int4 in blocks of 64 or 128 only, not of {block or 'a channel'}"
