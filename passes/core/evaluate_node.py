"""What one node of a graph computes, on a CPU: products stream their weights, our operators run their references."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort

from instantrt.passes.core.lazy import FLOAT32, Array, View, convert, view_of
from instantrt.passes.core.linear import weight_dequantize
from instantrt.passes.core.rewrite import producer, scalar
from instantrt.plugins.ops import DOMAIN, OPS

HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
WIDE: dict[np.dtype[Any], type[np.generic]] = {
    **dict.fromkeys(HALVES, np.float32),
    np.dtype(ml_dtypes.int4): np.int8,
    np.dtype(ml_dtypes.uint4): np.uint8,
}
OURS = {op.name: op for op in OPS}
EXTERNAL_BYTES = 1 << 20  # larger constants reach a session as they lie in memory, without a copy in a protobuf
SHARED_BYTES = 1 << 16  # of a model of one node that is kept for the next like it


def dependencies(node: gs.Node) -> list[gs.Tensor]:
    """The variables a node reads; a weight that streams is no variable."""
    read = node.inputs
    if node.op == "MatMul" and column_blocks(node.inputs[1]) is not None:
        read = node.inputs[:1]
    elif node.op == "Gather" and streamed_table(node) is not None:
        read = node.inputs[1:]
    return [t for t in read if isinstance(t, gs.Variable) and t.name]


def evaluate_node(node: gs.Node, values: Mapping[str, Array], graph: gs.Graph) -> list[Array]:
    """The outputs of one node."""
    return next(evaluate_each(node, [values], graph))


def evaluate_each(node: gs.Node, runs: Sequence[Mapping[str, Array]], graph: gs.Graph) -> Iterator[list[Array]]:
    """The outputs of one node in each of several runs; a weight streams once for all of them.

    A run may read what an earlier one has just made, unless the node streams: each is asked for when its turn comes.
    """
    streamed = STREAMED[node.op](node, runs) if node.op in STREAMED else None
    session: NodeSession | None = None
    types = [declared(node, tensor) for tensor in node.outputs]
    for index, values in enumerate(runs):
        if streamed is not None:
            outputs = [streamed[index]]
        elif node.op == "Cast":
            outputs = [cast(node, values)]
        elif node.domain == DOMAIN:
            op = OURS[node.op]
            inputs = [None if not t.name else value_of(t, values) for t in node.inputs]
            # A node also carries what TensorRT's parser looks for, such as the plugin's version.
            known = {a.name: node.attrs[a.name] for a in op.attrs if a.name in node.attrs}
            outputs = list(op.reference(*inputs, **known))
        else:
            session = session or NodeSession(node, values, graph)
            outputs = session(values)
        yield [narrow(value, dtype, node, values) for value, dtype in zip(outputs, types, strict=True)]


def value_of(tensor: gs.Tensor, values: Mapping[str, Array]) -> Array:
    view = view_of(tensor)
    if view is not None:
        return view.load()
    return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else values[tensor.name]


def declared(node: gs.Node, tensor: gs.Tensor) -> np.dtype[Any] | None:
    """The type of an output, where the node's scale or the graph says it."""
    scale = node.inputs[1].dtype if node.op == "DequantizeLinear" else None
    return next((numpy_type(known) for known in (scale, tensor.dtype) if known is not None), None)


def narrow(value: Array, dtype: np.dtype[Any] | None, node: gs.Node, values: Mapping[str, Array]) -> Array:
    """Rounds to the 16-bit type that an output has: the declared one, or that of the node's inputs."""
    if value.dtype != FLOAT32 or node.op == "Cast":
        return value
    if dtype is None:
        dtype = next((values[t.name].dtype for t in node.inputs if t.name in values), FLOAT32)
    return value.astype(dtype) if dtype in HALVES else value


def matmul(node: gs.Node, runs: Sequence[Mapping[str, Array]]) -> list[Array] | None:
    """x [..., K] @ W [K, N], W by blocks of columns; float32 sums."""
    blocks = column_blocks(node.inputs[1])
    if blocks is None:
        return None
    given = [convert(values[node.inputs[0].name], FLOAT32) for values in runs]
    rows = np.concatenate([x.reshape(-1, x.shape[-1]) for x in given])
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported by name
        product = np.concatenate([rows @ convert(block, FLOAT32) for block in ahead(blocks())], axis=1)
    return split_rows(product, [x.shape[:-1] for x in given])


def ahead(blocks: Iterator[Array]) -> Iterator[Array]:
    """The same; of a large matrix, each block is made by a thread while the one before it is in use."""
    block = next(blocks, None)
    if block is None or block.nbytes < EXTERNAL_BYTES:
        yield from () if block is None else (block, *blocks)
        return
    with ThreadPoolExecutor(1) as pool:
        while block is not None:
            coming = pool.submit(copy_context().run, lambda: next(blocks, None))  # NumPy's errstate is of a context
            yield block
            block = coming.result()


def split_rows(joined: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Rows [R, ...] of several runs, each in the shape of its own."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    parts = np.split(joined, ends)
    return [part.reshape(*shape, *joined.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]


def column_blocks(weight: gs.Tensor) -> ColumnBlocks | None:
    """Blocks of columns [K, n] of a constant matrix, or of what Cast, Transpose or DequantizeLinear make of one."""
    view = view_of(weight)
    if view is not None:
        return (lambda: (view.block(t) for t in view.source.tiles())) if view.axis == 1 else None
    node = weight.inputs[0] if weight.inputs else None
    make = COLUMNS.get(node.op) if node is not None else None
    return make(node) if make is not None else None


def transposed_blocks(node: gs.Node) -> ColumnBlocks | None:
    view = view_of(node.inputs[0])
    if view is None or view.axis != 0 or len(view.shape) != 2:
        return None
    return lambda: (view.block(t).T for t in view.source.tiles())


def dequantized(node: gs.Node) -> ColumnBlocks | None:
    """Codes, scale and zero come tile by tile from one source."""
    codes, *others = (view_of(t) for t in node.inputs)
    if codes is None or any(v is None or v.source != codes.source for v in others):
        return None
    return lambda: dequantized_blocks(codes, [v for v in others if v is not None], node.attrs)


def shifted(node: gs.Node) -> ColumnBlocks | None:
    """Reshape(DequantizeLinear(codes [G, g, N], scale) + minimum [G, 1, N]) as [K, N], by columns."""
    dq, plus = weight_dequantize(node.outputs[0]), producer(node.inputs[0], "Add")
    given = [*dq.inputs, plus.inputs[1]] if dq is not None and plus is not None else []
    views = [view for t in given if (view := view_of(t)) is not None]
    if not given or len(views) < len(given) or any(v.source != views[0].source for v in views):
        return None

    def blocks() -> Iterator[Array]:
        for tile in views[0].source.tiles():
            q, scale, minimum = (v.block(tile).astype(FLOAT32) for v in views)
            q *= scale
            q += minimum
            yield q.reshape(-1, q.shape[-1])

    return blocks


ColumnBlocks = Callable[[], Iterator[Array]]
COLUMNS: dict[str, Callable[[gs.Node], ColumnBlocks | None]] = {
    "Cast": lambda node: column_blocks(node.inputs[0]),
    "Transpose": transposed_blocks,
    "DequantizeLinear": dequantized,
    "Reshape": shifted,
}


def dequantized_blocks(codes: View, others: list[View], attrs: Mapping[str, Any]) -> Iterator[Array]:
    """DequantizeLinear(codes [K, N], scale, zero) by columns; scale and zero are [N], or [K / block_size, N]."""
    repeat = attrs.get("block_size", 0)
    for tile in codes.source.tiles():
        q = codes.block(tile).astype(FLOAT32)
        scale, *zero = (
            np.repeat(part, repeat, axis=0) if repeat else part
            for part in (v.block(tile).astype(FLOAT32) for v in others)
        )
        if zero:
            q -= zero[0]
        q *= scale
        yield q


def streamed_table(node: gs.Node) -> tuple[View, float | None] | None:
    """The table [V, ...] whose rows a Gather picks, and the one scale it is dequantized by, None where it is not."""
    codes, scale = node.inputs[0], None
    dq = producer(codes, "DequantizeLinear")
    if dq is not None and len(dq.inputs) == 2:
        codes, scale = dq.inputs[0], scalar(dq.inputs[1])
    view = view_of(codes)
    if view is None or view.axis != 0 or node.attrs.get("axis", 0) != 0 or (dq is not None and scale is None):
        return None
    return view, scale


def gather(node: gs.Node, runs: Sequence[Mapping[str, Array]]) -> list[Array] | None:
    """Rows of a stored table, picked as its tiles go by; IndexError for one that it does not have."""
    found = streamed_table(node)
    if found is None:
        return None
    view, scale = found
    given = [value_of(node.inputs[1], values) for values in runs]
    ids = np.concatenate([each.reshape(-1) for each in given])
    ids = np.where(ids < 0, ids + view.shape[0], ids)
    if ids.size and not 0 <= ids.min() <= ids.max() < view.shape[0]:
        raise IndexError(f"{node.name or node.op} picks rows {ids.min()} to {ids.max()} of {view.shape[0]}")
    out = np.empty((len(ids), *view.shape[1:]), view.dtype)
    for tile in view.source.tiles():
        here = (ids >= tile.start) & (ids < tile.start + len(tile.parts[0]))
        if here.any():
            out[here] = view.block(tile)[ids[here] - tile.start]
    rows = out if scale is None else out.astype(FLOAT32) * np.float32(scale)
    return split_rows(rows, [each.shape for each in given])


def cast(node: gs.Node, values: Mapping[str, Array]) -> Array:
    with np.errstate(over="ignore"):  # an infinity is reported by name
        return convert(value_of(node.inputs[0], values), numpy_type(node.attrs["to"]))


def numpy_type(dtype: Any) -> np.dtype[Any]:
    """A type as NumPy has it; graphs name those it lacks by ONNX's number."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else dtype)


STREAMED: dict[str, Callable[[gs.Node, Sequence[Mapping[str, Array]]], list[Array] | None]] = {
    "MatMul": matmul,
    "Gather": gather,
}


@dataclass(frozen=True)
class Given:
    """One input of a node: its type and sizes, and the bytes of a constant that is part of the model."""

    dtype: np.dtype[Any]
    shape: tuple[Any, ...]
    data: bytes | None = None


@dataclass(frozen=True)
class Lone:
    """A model of one node, by value and without names: like nodes share its session.

    attrs   name -> value, lists as tuples
    """

    op: str
    domain: str
    attrs: tuple[tuple[str, Any], ...]
    inputs: tuple[Given | None, ...]
    outputs: tuple[bool, ...]
    opset: int
    domains: tuple[tuple[str, int], ...]

    def model(self) -> onnx.ModelProto:
        inputs = [self.tensor(f"x{index}", given) for index, given in enumerate(self.inputs)]
        outputs = [gs.Variable(f"y{index}" if named else "") for index, named in enumerate(self.outputs)]
        node = gs.Node(self.op, "", dict(self.attrs), inputs, outputs, domain=self.domain)
        fed = [t for t in inputs if isinstance(t, gs.Variable) and t.name]
        domains = [onnx.helper.make_opsetid(*each) for each in self.domains]
        graph = gs.Graph([node], fed, [t for t in outputs if t.name], opset=self.opset, import_domains=domains or None)
        model: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
        return model

    @staticmethod
    def tensor(name: str, given: Given | None) -> gs.Tensor:
        if given is None:
            return gs.Variable.empty()
        if given.data is None:
            return gs.Variable(name, given.dtype, list(given.shape))
        return gs.Constant(name, np.ndarray(given.shape, given.dtype, given.data))


class NodeSession:
    """One node through ONNX Runtime. Constants stay constants: kernels that pack their weights then do so."""

    def __init__(self, node: gs.Node, values: Mapping[str, Array], graph: gs.Graph) -> None:
        inputs: list[Given | None] = []
        large: dict[str, Array] = {}
        self.fed: dict[str, str] = {}
        for index, tensor in enumerate(node.inputs):
            if not tensor.name:
                inputs.append(None)
                continue
            value = widened(value_of(tensor, values))
            if not folded(tensor):
                self.fed[f"x{index}"] = tensor.name
                inputs.append(Given(value.dtype, (None,) * value.ndim))
            elif value.nbytes < EXTERNAL_BYTES:
                inputs.append(Given(value.dtype, value.shape, value.tobytes()))
            else:
                large[f"x{index}"] = np.asarray(value, order="C")
                inputs.append(Given(value.dtype, value.shape))
        self.named = tuple(bool(t.name) for t in node.outputs)
        self.outputs = [f"y{index}" for index, named in enumerate(self.named) if named]
        attrs = tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in sorted(node.attrs.items()))
        domains = tuple((each.domain, each.version) for each in graph.import_domains or ())
        lone = Lone(node.op, node.domain, attrs, tuple(inputs), self.named, graph.opset, domains)
        small = sum(len(given.data) for given in inputs if given is not None and given.data) < SHARED_BYTES
        share = small and not large and all(plain(value) for _, value in attrs)
        self.session = shared_session(lone) if share else new_session(lone, large)

    def __call__(self, values: Mapping[str, Array]) -> list[Array]:
        feeds = {x: np.asarray(widened(values[name]), order="C") for x, name in self.fed.items()}
        results = iter(self.session.run(self.outputs, feeds))
        return [next(results) if named else np.empty(0) for named in self.named]


def folded(tensor: gs.Tensor) -> bool:
    """Is it a constant to a runtime's kernels, which the Cast of one is by the time that they are made?"""
    cast = producer(tensor, "Cast")
    return isinstance(tensor if cast is None else cast.inputs[0], gs.Constant)


def widened(value: Array) -> Array:
    """A 16-bit float as the 32 bits that a node computes in, a four-bit integer as one of eight."""
    return value.astype(WIDE[value.dtype]) if value.dtype in WIDE else value


def plain(attribute: Any) -> bool:
    """Is it known by its value? Tensors and graphs are not."""
    return isinstance(attribute, (int, float, str)) or (isinstance(attribute, tuple) and all(map(plain, attribute)))


def new_session(lone: Lone, large: Mapping[str, Array]) -> ort.InferenceSession:
    model = lone.model()
    externalize(model, large)
    return plain_session(model, large)


def plain_session(model: onnx.ModelProto, large: Mapping[str, Array] | None = None) -> ort.InferenceSession:
    """A session for a small model, which it runs as it is; `large` are the values of its external initializers."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is said by the error
    options.intra_op_num_threads = 1  # a thread pool for each node costs more than it brings
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    values = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in (large or {}).items()}
    options.add_external_initializers(list(values), list(values.values()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@lru_cache(maxsize=256)
def shared_session(lone: Lone) -> ort.InferenceSession:
    return new_session(lone, {})


def externalize(model: onnx.ModelProto, large: Mapping[str, Array]) -> None:
    """Turns the inputs that `large` names into initializers whose values are handed over apart."""
    kept = [i for i in model.graph.input if i.name not in large]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for name, value in large.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=value.shape, data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="memory")
        model.graph.initializer.append(tensor)
