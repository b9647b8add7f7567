"""Do two ONNX models of one interface compute the same? Asked of ONNX Runtime, on random inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from instantrt.passes.core.errors import first_line
from instantrt.passes.core.node_session import plain_session

Array = npt.NDArray[Any]
RELATIVE, ABSOLUTE = 1e-4, 1e-5  # of a value; of the largest one: two kernels of one operator may add in another order
MOST, LESS = 1 << 18, 16  # elements of all inputs, and what a size is cut to where there are more
# The size of what has a name or nothing; what integers are below; the axes of what has no shape.
ATTEMPTS = ((6, 2, 3), (16, 2, 4), (6, 1, 2))
NO_KERNEL = "Could not find an implementation"

# Inputs that are sizes by their name in the operator's schema: how many, and the shape of the first input -> values
# that an operator can take.
SIZES: Mapping[str, Callable[[int, Sequence[int]], list[float]]] = {
    "scales": lambda n, shape: [1.0] * (n - 2) + [2.0, 1.5],
    "sizes": lambda n, shape: [*shape[:-2], *(2 * d + 1 for d in shape[-2:])],
    "shape": lambda n, shape: [-1, *[1] * (n - 1)],
    "repeats": lambda n, shape: [2] * n,
    "K": lambda n, shape: [1] * n,
}


@dataclass(frozen=True)
class Finding:
    """`differs`: they are not the same, because ...; else a reason says why they could not be compared."""

    differs: bool = False
    reason: str = ""


class Unknown(Exception):  # noqa: N818 -- no error: says what is not known
    """Inputs cannot be made up."""


def compared(old: onnx.ModelProto, new: onnx.ModelProto, used: int) -> Finding:
    """The first `used` outputs of a model of one node, and of what replaces it."""
    names = [o.name for o in old.graph.output if int(o.name[1:]) < used]
    reason = ""
    for attempt in ATTEMPTS:
        try:
            feeds = random_feeds(old, *attempt)
            want, again = outputs(old, names, feeds, times=2)
        except Exception as error:  # ONNX Runtime's are of many types
            reason = reason or first_line(error)
            continue
        try:
            (got,) = outputs(new, names, feeds)
        except Exception as error:
            return Finding(NO_KERNEL not in str(error), first_line(error))
        random = any(difference(a, b) for a, b in zip(want, again, strict=True))
        found = [difference(a, b, values=not random) for a, b in zip(want, got, strict=True)]
        return Finding(differs=True, reason=next(filter(None, found))) if any(found) else Finding()
    return Finding(reason=reason)


def outputs(model: onnx.ModelProto, names: list[str], feeds: Mapping[str, Array], times: int = 1) -> list[list[Any]]:
    """As ONNX Runtime computes them each time, with the types that it finds."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.output[:], bare.graph.value_info[:]
    bare.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    for value in bare.graph.input:
        array = feeds[value.name]
        value.type.CopyFrom(onnx.helper.make_tensor_type_proto(element_type(array), array.shape))
    session = plain_session(bare)
    return [session.run(names, dict(feeds)) for _ in range(times)]


def element_type(array: Array) -> int:
    return onnx.TensorProto.STRING if array.dtype == object else onnx.helper.np_dtype_to_tensor_dtype(array.dtype)


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


def random_feeds(model: onnx.ModelProto, size: int, below: int, axes: int) -> dict[str, Array]:
    """For each input of the one node's model, of its declared type; where nothing is declared, of any type."""
    rng = np.random.default_rng(0)
    (node,) = model.graph.node
    meanings = dict.fromkeys(node.input, "")
    if onnx.defs.has(node.op_type):  # else it is ONNX Runtime's own
        inputs = onnx.defs.get_schema(node.op_type, model.opset_import[0].version, "").inputs
        meanings = {name: inputs[min(i, len(inputs) - 1)].name for i, name in enumerate(node.input)}
    if any(value.type.WhichOneof("value") not in (None, "tensor_type") for value in model.graph.input):
        raise Unknown("an input is no tensor")
    kinds = {value.name: value.type.tensor_type for value in model.graph.input}
    shapes = {
        name: [d.dim_value if d.HasField("dim_value") else size for d in kind.shape.dim]
        if kind.HasField("shape")
        else [size] * axes
        for name, kind in kinds.items()
    }
    if sum(map(math.prod, shapes.values())) > MOST:
        shapes = {name: [min(d, LESS) for d in shape] for name, shape in shapes.items()}
    feeds: dict[str, Array] = {}
    for name, shape in shapes.items():
        element, values = kinds[name].elem_type or onnx.TensorProto.FLOAT, SIZES.get(meanings[name])
        if values is not None and len(shape) == 1 and feeds:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
            feeds[name] = np.array(values(shape[0], next(iter(feeds.values())).shape), dtype)
        else:
            feeds[name] = random_array(element, shape, below, rng)
    return feeds


def random_array(kind: int, shape: list[int], below: int, rng: np.random.Generator) -> Array:
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    if kind == onnx.TensorProto.STRING:
        return np.full(shape, "1", object)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind not in "iub":
        raise Unknown(f"an input is of type {dtype}")
    return rng.integers(0, below, shape).astype(dtype)
