"""Do two ONNX models of one interface compute the same? Asked of ONNX Runtime, on random inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

Array = npt.NDArray[Any]
RELATIVE, ABSOLUTE = 1e-4, 1e-5  # of a value; of the largest one: two kernels of one operator may add in another order
MOST = 1 << 22  # elements of an input
ATTEMPTS = ((6, 2), (16, 2), (6, 1))  # the size of what has a name or nothing; integers are below the second number
NO_KERNEL = "Could not find an implementation"

# Inputs that are sizes by their name in the operator's schema: n -> values that an operator can take.
SIZES: Mapping[str, Callable[[int], list[float]]] = {
    "scales": lambda n: [1.0] * (n - 2) + [2.0, 1.5],
    "shape": lambda n: [-1, *[1] * (n - 1)],
    "repeats": lambda n: [2] * n,
    "K": lambda n: [1] * n,
}


@dataclass(frozen=True)
class Verdict:
    """`differs`: they are not the same, because ...; else a reason says why they could not be compared."""

    differs: bool = False
    reason: str = ""


class Unknown(Exception):  # noqa: N818 -- no error: says what is not known
    """Inputs cannot be made up."""


def compared(old: onnx.ModelProto, new: onnx.ModelProto, used: int) -> Verdict:
    """The first `used` outputs of a model of one node, and of what replaces it."""
    names = [o.name for o in old.graph.output if int(o.name[1:]) < used]
    reason = ""
    for size, below in ATTEMPTS:
        try:
            feeds = random_feeds(old, size, below)
            want, again = (outputs(old, names, feeds) for _ in range(2))
        except Exception as error:  # ONNX Runtime's are of many types
            reason = reason or first_line(error)
            continue
        try:
            got = outputs(new, names, feeds)
        except Exception as error:
            return Verdict(NO_KERNEL not in str(error), first_line(error))
        random = any(difference(a, b) for a, b in zip(want, again, strict=True))
        found = [difference(a, b, values=not random) for a, b in zip(want, got, strict=True)]
        return Verdict(differs=True, reason=next(filter(None, found))) if any(found) else Verdict()
    return Verdict(reason=reason)


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def outputs(model: onnx.ModelProto, names: list[str], feeds: Mapping[str, Array]) -> list[Any]:
    """As ONNX Runtime computes them, and with the types that it finds."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.output[:], bare.graph.value_info[:]
    bare.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(bare.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(names, dict(feeds))
    return found


def difference(want: Any, got: Any, *, values: bool = True) -> str:
    """In what two outputs differ, in words; nothing where they do not. Random ones agree in type and shape."""
    a, b = np.asarray(want), np.asarray(got)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{b.dtype} {list(b.shape)} where {a.dtype} {list(a.shape)} was"
    if not values:
        return ""
    if a.dtype.kind not in "fc":
        return "" if np.array_equal(a, b) else "other values"
    finite = np.abs(a[np.isfinite(a)])
    largest = float(finite.max(initial=0))
    if np.allclose(b, a, RELATIVE, ABSOLUTE * largest, equal_nan=True):
        return ""
    return f"values that are off by up to {np.nanmax(np.abs(a - b)):.3g} of {largest:.3g}"


def random_feeds(model: onnx.ModelProto, size: int, below: int) -> dict[str, Array]:
    """For each input of the one node's model, of its declared type."""
    rng = np.random.default_rng(0)
    (node,) = model.graph.node
    schema = onnx.defs.get_schema(node.op_type, model.opset_import[0].version, "")
    meanings = {name: schema.inputs[min(i, len(schema.inputs) - 1)].name for i, name in enumerate(node.input)}
    sizes: dict[str, int] = {}
    return {i.name: random_input(i, meanings[i.name], size, below, rng, sizes) for i in model.graph.input}


def random_input(
    value: onnx.ValueInfoProto, meaning: str, size: int, below: int, rng: np.random.Generator, sizes: dict[str, int]
) -> Array:
    kind = value.type.tensor_type
    if not kind.elem_type or not kind.HasField("shape"):
        raise Unknown(f"the type of its input {meaning} is not known")
    shape = [d.dim_value if d.HasField("dim_value") else sizes.setdefault(d.dim_param, size) for d in kind.shape.dim]
    if math.prod(shape) > MOST:
        shape = [min(d, 32) for d in shape]
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    if meaning in SIZES and len(shape) == 1:
        return np.array(SIZES[meaning](shape[0]), dtype)
    if kind.elem_type == onnx.TensorProto.STRING:
        return np.full(shape, "1", object)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind not in "iub":
        raise Unknown(f"its input {meaning} is of type {dtype}")
    return rng.integers(0, below, shape).astype(dtype)
