"""One node for each form that an operator has had: what it is given, and what it says.

`CASES` is {(operator, label): Case}. A case runs at the opsets `first` to `last` at which it is valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper

Array = np.ndarray[Any, Any]
LAST = 22
RANDOM = np.random.default_rng(0)


@dataclass(frozen=True)
class Const:
    """An input that is an initializer."""

    value: Array


@dataclass(frozen=True)
class Case:
    """inputs: arrays that are fed, constants, None where one is left out."""

    op: str
    inputs: tuple[Array | Const | None, ...]
    attributes: dict[str, Any]
    first: int
    last: int
    outputs: int


CASES: dict[tuple[str, str], Case] = {}


def case(
    ops: str, label: str, inputs: list[Any], first: int = 7, last: int = LAST, outputs: int = 1, **attributes: Any
) -> None:
    for op in ops.split():
        CASES[op, label] = Case(op, tuple(inputs), attributes, first, last, outputs)


def floats(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def const(*values: float, dtype: Any = np.float32) -> Const:
    return Const(np.array(values, dtype))


def whole(*values: int) -> Const:
    return Const(ints(*values))


def number(value: float, dtype: Any = np.float32) -> Const:
    return Const(np.array(value, dtype))


X, IMAGE, ROWS = floats(2, 3, 4, 5), floats(1, 2, 4, 6), floats(3, 5)
POSITIVE = np.abs(X) + 1
TRUE, FALSE = np.array([True, False]), np.array([True, True])

# One value at a time.
case("Abs Neg Ceil Floor Exp Relu Sigmoid Tanh Sin Cos Tan Atan Elu Selu Softplus Softsign", "", [X])
case("HardSigmoid LeakyRelu Identity Shape Size", "", [X])
case("Sign Erf Sinh Cosh Asinh", "", [X], 9)
case("Asin Acos", "", [np.tanh(X)])
case("Atanh", "", [np.tanh(X)], 9)
case("Log Sqrt Reciprocal", "", [POSITIVE])
case("Acosh", "", [POSITIVE], 9)
case("Round", "", [X * 3], 11)
case("HardSwish", "", [X], 14)
case("Mish", "", [X], 18)
case("Celu", "", [X], 12, alpha=0.5)
case("ThresholdedRelu", "", [X], 10)
case("IsInf", "", [np.array([np.inf, 1, -np.inf], np.float32)], 10, detect_negative=0)
case("IsNaN", "", [np.array([np.nan, 1], np.float32)], 9)
for name, to in (("float", 1), ("half", 10), ("int", 7), ("bool", 9), ("int8", 3), ("uint8", 2)):
    case("Cast", name, [X * 3], to=to)
case("Cast", "string", [X], 9, to=TensorProto.STRING)
case("Cast", "from strings", [np.array(["1", "2.5", "-INF", "1e-3"], object)], 9, to=1)
case("Cast", "float8", [X * 300], 19, to=TensorProto.FLOAT8E4M3FN)
case("Cast", "float8, unsaturated", [X * 300], 19, to=TensorProto.FLOAT8E4M3FN, saturate=0)
case("CastLike", "", [X, np.array([1], np.float16)], 15)
case("Clip", "attributes", [X], 7, 10, min=-0.5, max=0.5)
case("Clip", "one attribute", [X], 7, 10, min=-0.5)
case("Clip", "nothing", [X], 7, 10)
case("Clip", "inputs", [X, number(-0.5), number(0.5)], 11)
case("Dropout", "", [X])
case("Dropout", "ratio", [X], 7, 11, ratio=0.3)
case("Dropout", "inputs", [X, number(0.3), number(0, bool)], 12, outputs=2)

# Several.
case("Add Sub Mul Div", "", [X, floats(4, 1)])
case("Div", "integers", [ints(-7, 7, -8), ints(2, -2, 3)])
case("Pow", "", [np.abs(X), np.float32(2.5)])
case("Pow", "integers", [X, ints(2)], 12)
case("Mod", "integers", [ints(-7, 7, -8), ints(2, -2, 3)], 10)
case("Mod", "fmod", [X, floats(5)], 10, fmod=1)
case("Greater Less", "", [X, floats(5)])
case("GreaterOrEqual LessOrEqual", "", [X, floats(5)], 12)
case("Equal", "integers", [ints(1, 2), ints(1, 3)])
case("Equal", "booleans", [TRUE, FALSE])
case("Equal", "floats", [np.float32([1, 2]), np.float32([1, 3])], 11)
case("Max Min Sum Mean", "", [X, floats(4, 1), floats(5)], 8)
case("Max Min Sum Mean", "one shape", [floats(3, 4), floats(3, 4)])
case("Max Min", "integers", [ints(1, 2), ints(3, 0)], 12)
case("Where", "", [TRUE, floats(2), floats(2)], 9)
case("PRelu", "", [IMAGE, floats(2, 1, 1)])
case("MatMul", "", [floats(2, 3), floats(3, 4)])
case("Gemm", "", [floats(2, 3), floats(3, 4), floats(4)], alpha=0.5, beta=2.0)
case("Gemm", "no bias", [floats(2, 3), floats(4, 3)], 11, transB=1)

# Axes.
REDUCTIONS = "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare"
for ops, end in ((REDUCTIONS, 17), ("ReduceSum", 12)):
    case(ops, "attribute", [POSITIVE], 7, end, axes=[1, 2], keepdims=0)
    case(ops, "from the end", [POSITIVE], 11, end, axes=[-1])
    case(ops, "all axes", [POSITIVE], 7, end)
    case(ops, "input", [POSITIVE, whole(1)], end + 1)
    case(ops, "no axes", [POSITIVE, whole()], end + 1)
    case(ops, "no axes do nothing", [POSITIVE, whole()], end + 1, noop_with_empty_axes=1)
case("ArgMax ArgMin", "", [X], axis=1, keepdims=0)
case("ArgMax ArgMin", "ties", [np.ones((2, 3), np.float32)], axis=1)
case("ArgMax ArgMin", "the last", [np.ones((2, 3), np.float32)], 12, axis=1, select_last_index=1)
case("ArgMax ArgMin", "from the end", [X], 11, axis=-2)
SOFTMAX = "Softmax LogSoftmax Hardmax"
case(SOFTMAX, "default", [X])
for axis in range(4):
    case(SOFTMAX, f"axis {axis}", [X], axis=axis)
case(SOFTMAX, "rank 2", [ROWS])
case(SOFTMAX, "axis -1", [X], 11, axis=-1)
case(SOFTMAX, "axis -2", [X], 11, axis=-2)
case("CumSum", "", [X, number(1, np.int64)], 11, exclusive=1, reverse=1)
case("Concat", "", [X, X], axis=1)
case("Concat", "from the end", [X, X], 11, axis=-2)
case("Flatten", "", [X], axis=2)
case("Flatten", "from the end", [X], 11, axis=-1)
case("Squeeze Unsqueeze", "attribute", [floats(1, 3, 1)], 7, 12, axes=[0, 2])
case("Squeeze Unsqueeze", "from the end", [floats(1, 3, 1)], 11, 12, axes=[-1])
case("Squeeze Unsqueeze", "input", [floats(1, 3, 1), whole(-1)], 13)
case("Squeeze", "all axes", [floats(1, 3, 1)])
case("Transpose", "", [X], perm=[0, 2, 1, 3])
case("Transpose", "reversed", [X])
case("TopK", "attribute", [ROWS], 7, 9, outputs=2, k=2, axis=1)
case("TopK", "input", [ROWS, whole(2)], 10, outputs=2)
case("TopK", "smallest", [ROWS, whole(2)], 11, outputs=2, largest=0)

# Shapes and places.
case("Reshape", "", [X, whole(0, -1)])
case("Reshape", "at run time", [X, ints(6, 20)])
case("Reshape", "zeros", [np.zeros((0, 3), np.float32), whole(3, 0)], 14, allowzero=1)
case("Expand", "", [floats(3, 1), whole(2, 3, 4)], 8)
case("Tile", "", [floats(2, 3), whole(2, 1)])
case("ConstantOfShape", "", [ints(2, 3)], 9, value=helper.make_tensor("v", 1, [1], [2.5]))
case("ConstantOfShape", "zeros", [ints(2, 3)], 9)
case("EyeLike", "", [floats(3, 4)], 9, k=1)
PADS = [0, 0, 1, 1, 0, 0, 2, 1]
case("Pad", "attribute", [X], 7, 10, pads=PADS, value=1.5)
case("Pad", "reflected", [X], 7, 10, pads=PADS, mode="reflect")
case("Pad", "edges, negative", [X], 7, 10, pads=[0, 0, 1, -1, 0, 0, 2, 1], mode="edge")
case("Pad", "input", [X, whole(*PADS), number(1.5)], 11)
case("Pad", "axes", [X, whole(1, 2), number(0), whole(-1)], 18)
case("Pad", "wrapped", [X, whole(*PADS)], 19, mode="wrap")
case("Slice", "attributes", [X], 7, 9, starts=[1, 0], ends=[3, -1], axes=[2, 3])
case("Slice", "to the end", [X], 7, 9, starts=[-2], ends=[(1 << 63) - 1], axes=[3])
case("Slice", "the first axes", [X], 7, 9, starts=[0, 1], ends=[1, 3])
case("Slice", "inputs", [X, whole(0), whole(-1), whole(1)], 10)
case("Slice", "steps", [X, whole(-1), whole(-100), whole(3), whole(-1)], 10)
case("Split", "equal parts", [X], 7, 17, outputs=2, axis=2)
case("Split", "from the end", [X], 11, 17, outputs=3, axis=-3)
case("Split", "attribute", [X], 7, 12, outputs=2, axis=3, split=[2, 3])
case("Split", "input", [X, whole(2, 3)], 13, outputs=2, axis=3)
case("Split", "a number of parts", [X], 18, outputs=2, axis=3, num_outputs=2)
case("Compress", "", [X, np.array([True, False, True])], 9, axis=1)
case("Gather", "", [X, ints(0, 2)], axis=1)
case("Gather", "from the end", [X, ints(0, -1)], 11, axis=1)
case("GatherElements", "", [floats(2, 3), np.array([[0, 1, 0], [1, 0, -1]])], 11)
case("GatherND", "", [floats(2, 3), np.array([[0, 1], [1, 0]])], 11)
case("GatherND", "batches", [floats(2, 3), np.array([[1], [0]])], 12, batch_dims=1)
PLACES = np.array([[1, 0, 2], [0, 2, 1]])
case("Scatter", "", [floats(3, 3), PLACES, floats(2, 3)], 9, 10)
case("ScatterElements", "", [floats(3, 3), PLACES, floats(2, 3)], 11)
case("ScatterElements", "sums", [floats(3, 3), PLACES, floats(2, 3)], 16, reduction="add")
case("ScatterND", "", [floats(3, 3), np.array([[1, 0], [2, 2]]), floats(2)], 11)
case("NonZero", "", [np.float32([0, 1, 2, 0])], 9)
case("OneHot", "", [ints(0, 2), whole(3), const(0, 1)], 9)
case("OneHot", "from the end", [ints(0, -2), whole(3), const(0, 1)], 11)
case("DepthToSpace", "", [floats(1, 8, 2, 3)], blocksize=2)
case("DepthToSpace", "columns first", [floats(1, 8, 2, 3)], 11, blocksize=2, mode="CRD")
case("SpaceToDepth", "", [IMAGE], blocksize=2)
case("Trilu", "", [floats(3, 3)], 14)
case("Unique", "", [np.float32([2, 1, 2])], 11, outputs=2)
BOXES = [np.abs(floats(1, 6, 4)), np.abs(floats(1, 1, 6))]
case("NonMaxSuppression", "", [*BOXES, whole(3), const(0.5), const(0.1)], 10)

# Normalizations.
STATISTICS = [floats(2, 3, 4), floats(3), floats(3), floats(3), np.abs(floats(3)) + 0.5]
ELEMENTWISE = [floats(2, 3, 4), *(floats(3, 4) for _ in range(3)), np.abs(floats(3, 4)) + 0.5]
case("BatchNormalization", "", STATISTICS, epsilon=1e-3)
case("BatchNormalization", "spatial", STATISTICS, 7, 8, spatial=1)
case("BatchNormalization", "elements", ELEMENTWISE, 7, 8, spatial=0)
case("BatchNormalization", "training", STATISTICS, 14, outputs=3, training_mode=1)
case("InstanceNormalization", "", [IMAGE, floats(2), floats(2)])
case("GroupNormalization", "", [floats(2, 4, 3), floats(2), floats(2)], 18, 20, num_groups=2)
case("GroupNormalization", "constants", [floats(2, 4, 3), const(1, 2), const(3, 4)], 18, 20, num_groups=2, epsilon=0.1)
case("LRN", "", [IMAGE], size=3)
case("LpNormalization", "", [IMAGE], axis=1, p=1)
case("MeanVarianceNormalization", "", [IMAGE], 9)

# Windows.
WINDOW: dict[str, Any] = {"kernel_shape": [2, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
CEILING = {**WINDOW, "kernel_shape": [3, 3], "ceil_mode": 1}
case("AveragePool MaxPool LpPool", "", [IMAGE], **WINDOW)
case("AveragePool MaxPool LpPool", "same", [IMAGE], kernel_shape=[2, 2], strides=[1, 1], auto_pad="SAME_LOWER")
case("AveragePool", "padding counts", [IMAGE], **WINDOW, count_include_pad=1)
case("AveragePool MaxPool", "ceiling", [floats(1, 2, 6, 6)], 10, **CEILING)
case("AveragePool", "ceiling, padding counts", [floats(1, 2, 6, 6)], 10, **CEILING, count_include_pad=1)
case("AveragePool", "dilated", [IMAGE], 19, kernel_shape=[2, 2], dilations=[2, 2])
case("MaxPool", "indices", [IMAGE], 8, outputs=2, kernel_shape=[2, 2], strides=[2, 2], storage_order=1)
case("GlobalAveragePool GlobalMaxPool", "", [IMAGE])
case("MaxUnpool", "", [np.float32([[[[1, 2], [3, 4]]]]), np.array([[[[5, 7], [13, 15]]]])], 9,
     kernel_shape=[2, 2], strides=[2, 2])  # fmt: skip
case("Conv", "", [IMAGE, floats(3, 2, 3, 3), floats(3)], pads=[1, 1, 1, 1])
case("Conv", "same", [IMAGE, floats(3, 2, 2, 2)], auto_pad="SAME_LOWER")
for low in ("SAME_LOWER", "SAME_UPPER"):
    case("ConvTranspose", low, [IMAGE, floats(2, 3, 3, 3)], strides=[2, 2], auto_pad=low)
case("ConvTranspose", "shape", [IMAGE, floats(2, 3, 3, 3)], strides=[2, 2], output_shape=[8, 12])
case("DeformConv", "", [floats(1, 1, 3, 3), floats(1, 1, 2, 2), floats(1, 8, 2, 2)], 19, kernel_shape=[2, 2])

# Coordinates.
SMALL, LARGE = floats(1, 2, 4, 5), floats(1, 2, 8, 10)
UP, ODD, DOWN = const(1, 1, 2, 2), const(1, 1, 2.5, 1.6), const(1, 1, 0.5, 0.5)
NOTHING, SIZES = const(), whole(1, 2, 7, 8)
for mode in ("nearest", "linear"):
    case("Upsample", f"{mode}, attribute", [SMALL], 7, 8, mode=mode, scales=[1.0, 1.0, 2.5, 1.6])
    case("Upsample", f"{mode}, input", [SMALL, ODD], 9, 9, mode=mode)
    case("Upsample", f"{mode}, at run time", [SMALL, UP.value], 9, 9, mode=mode)
    case("Resize", f"{mode}, opset 10", [SMALL, ODD], 10, 10, mode=mode)
    case("Resize", f"{mode}, opset 10, smaller", [LARGE, DOWN], 10, 10, mode=mode)
    case("Resize", f"{mode}, opset 10, at run time", [SMALL, ODD.value], 10, 10, mode=mode)
    case("Resize", f"{mode}, sizes", [SMALL, NOTHING, NOTHING, SIZES], 11, mode=mode)
    case("Resize", f"{mode}, sizes alone", [SMALL, None, None, SIZES], 13, mode=mode)
    case("Resize", f"{mode}, default", [SMALL, NOTHING, ODD], 11, mode=mode)
    for where in ("asymmetric", "align_corners", "pytorch_half_pixel"):
        case("Resize", f"{mode}, {where}", [SMALL, NOTHING, ODD], 11, mode=mode, coordinate_transformation_mode=where,
             nearest_mode="floor")  # fmt: skip
    case("Resize", f"{mode}, for NN", [SMALL, NOTHING, ODD], 11, 12, mode=mode,
         coordinate_transformation_mode="tf_half_pixel_for_nn")  # fmt: skip
case("Resize", "cubic", [LARGE, NOTHING, const(1, 1, 0.5, 0.6)], 11, mode="cubic", exclude_outside=1)
GRID = [floats(1, 1, 4, 4), np.tanh(floats(1, 3, 3, 2)) * np.float32(1.2)]
for old, new in (("bilinear", "linear"), ("nearest", "nearest"), ("bicubic", "cubic")):
    case("GridSample", old, GRID, 16, 19, mode=old, padding_mode="border")
    case("GridSample", f"{new}, today", GRID, 20, mode=new, align_corners=1)

# Sequences of steps.
for op, gates, outputs in (("RNN", 1, 2), ("GRU", 3, 2), ("LSTM", 4, 3)):
    for ways in (1, 2):
        weights = [floats(5, 2, 4), floats(ways, gates * 3, 4), floats(ways, gates * 3, 3), floats(ways, 6 * gates)]
        case(op, f"{ways} ways", [*weights, np.array([5, 3], np.int32), floats(ways, 2, 3)], outputs=outputs,
             hidden_size=3, clip=2.0, direction=("forward", "bidirectional")[ways - 1])  # fmt: skip
case("ReverseSequence", "", [floats(4, 3), ints(4, 2, 1)], 10)
case("DFT", "", [floats(2, 8, 1)], 17, 19, axis=1)
case("DFT", "the second axis", [floats(2, 8, 6, 1)], 17, 19, axis=2, onesided=1)
case("DFT", "axis as an input", [floats(2, 8, 1)], 20)

# The rest.
case("NegativeLogLikelihoodLoss", "", [ROWS, ints(1, 0, 4), floats(5)], 12, ignore_index=0)
case("SoftmaxCrossEntropyLoss", "", [ROWS, ints(1, 0, 4)], 12)
case("Det", "", [floats(2, 3, 3)], 11)
case("Einsum", "", [floats(2, 3), floats(3, 4)], 12, equation="ij,jk->ik")
case("Range", "", [number(0, np.int64), number(5, np.int64), number(2, np.int64)], 11)
