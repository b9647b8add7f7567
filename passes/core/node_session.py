"""One node through ONNX Runtime, by itself and unfused; like nodes share a session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort

from instantrt.passes.core.lazy import FLOAT32, Array, convert, view_of
from instantrt.passes.core.rewrite import producer

HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
WIDE: dict[np.dtype[Any], np.dtype[Any]] = {
    **dict.fromkeys(HALVES, FLOAT32),
    np.dtype(ml_dtypes.int4): np.dtype(np.int8),
    np.dtype(ml_dtypes.uint4): np.dtype(np.uint8),
}
EXTERNAL_BYTES = 1 << 20  # larger constants reach a session as they lie in memory, without a copy in a protobuf
SHARED_BYTES = 1 << 16  # of a model of one node that is kept for the next like it


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
    return convert(value, WIDE[value.dtype]) if value.dtype in WIDE else value


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


def value_of(tensor: gs.Tensor, values: Mapping[str, Array]) -> Array:
    view = view_of(tensor)
    if view is not None:
        return view.load()
    return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else values[tensor.name]
