"""Graphs whose operators have meant something else, float16 that rounds, and rotary tables that change with length."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto
from onnx.helper import make_opsetid, make_sparse_tensor, make_tensor
from onnx.numpy_helper import from_array

from tests.corpus.row import Row
from tests.models import make

MATRIX = "(float[b, 4] x) => (float[b, 4] y)"
PICTURE = "(float[b, 4, 6, 5] x) => (float[b, 4, h, w] y)"
EXACT: Mapping[str, Any] = {"quant": "none"}


def graph(
    body: str, opset: int, signature: str = MATRIX, ir: int = 8, imports: str = "", **weights: Any
) -> Callable[[Path], Path]:
    """A model in ONNX's text syntax."""

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        head = f'<ir_version: {ir}, opset_import: ["": {opset}{imports}]> g {signature}'
        model = onnx.parser.parse_model(f"{head} {{ {body} }}")
        model.graph.initializer.extend(from_array(np.asarray(value), name) for name, value in weights.items())
        onnx.save(model, folder / "model.onnx")
        return folder / "model.onnx"

    return write


def changed(write: Callable[[Path], Path], change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], Path]:
    def again(folder: Path) -> Path:
        path = write(folder)
        model = onnx.load(path)
        change(model)
        onnx.save(model, path)
        return path

    return again


def function(model: onnx.ModelProto) -> None:
    body = "Leaky <k: float = 0.5> (p) => (r) { r = LeakyRelu <alpha: float = @k> (p) }"
    text = f'<domain: "my", opset_import: ["": 17]> {body}'
    model.functions.append(onnx.parser.parse_function(text))


def sparse(model: onnx.ModelProto) -> None:
    values, places = make_tensor("w", TensorProto.FLOAT, [1], [2.5]), make_tensor("i", TensorProto.INT64, [1], [2])
    model.graph.sparse_initializer.append(make_sparse_tensor(values, places, [4]))


def rope(family: str, parameters: Mapping[str, Any], **fields: Any) -> Callable[[Path], Path]:
    """A checkpoint of one layer, whose rotary table switches at 16 tokens."""

    def write(folder: Path) -> Path:
        make(family, folder, **{"num_hidden_layers": 1, "rope_parameters": deepcopy(parameters), **fields})
        return folder

    return write


def config(write: Callable[[Path], Path], **fields: Any) -> Callable[[Path], Path]:
    """The checkpoint, with other words in its config.json; None takes one out."""

    def again(folder: Path) -> Path:
        file = write(folder) / "config.json"
        said = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
        return folder

    return again


def converter(what: str, make: Callable[[Path], Path], refused: str = "", **fields: Any) -> Row:
    return Row(what, "converters", make, refused, {**EXACT, **fields})


def state(what: str, make: Callable[[Path], Path], refused: str = "", **fields: Any) -> Row:
    return Row(what, "state across calls", make, refused, {**EXACT, **fields})


ODD, UP = [1, 1, 2.5, 1.6], [1.0, 1.0, 2.0, 2.0]
SCALES = {"s": np.float32(ODD)}
GROUPS = {"g": np.float32([1, -2]), "c": np.float32([3, 0.5])}
STATISTICS = {name: np.linspace(start, 3, 20, dtype=np.float32).reshape(4, 5) for start, name in enumerate("gcmv", 1)}
NESTED = """zero = Constant <value = float {0.0}> () e = ReduceMax <keepdims = 0> (x) c = Greater(e, zero)
    y = If(c) <then_branch = a () => (float[b, 4] p) { p = Hardmax <axis = 0> (x) },
               else_branch = d () => (float[b, 4] q) { q = Softmax <axis = 0> (x) }>"""
LOOP = """n = Constant <value = int64 {3}> () y = Loop(n, , x) <body = one (int64 i, bool c, float[b, 4] p) =>
    (bool d, float[b, 4] q) { d = Identity(c) r = LogSoftmax <axis = 0> (p) q = Add(r, x) }>"""
ROUNDED = "h = Cast <to = %d> (x) w = Cast <to = 1> (h) d = Sub(x, w) y = Mul(d, k)"
LIKE = graph("y = Add(x, w)", 17)

SHORT, LONG = [1.0 + i / 8 for i in range(8)], [2.0 + i for i in range(8)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
PHI3: dict[str, Any] = {"original_max_position_embeddings": 16, "max_position_embeddings": 64, "sliding_window": None}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
INSIDE = {**LONGROPE, "original_max_position_embeddings": 16, "rope_theta": 1e4}
BOTH = {"full_attention": INSIDE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
GEMMA: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
PHI, LLAMA = rope("phi3", LONGROPE, **PHI3), rope("llama", DYNAMIC, max_position_embeddings=16)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SWITCHES = "the rotary table changes with the length of the sequence"

ROWS = (
    converter("opset 10: Resize, nearest", graph("y = Resize(x, s)", 10, PICTURE, **SCALES)),
    converter("opset 10: Resize, linear", graph('y = Resize <mode = "linear"> (x, s)', 10, PICTURE, **SCALES)),
    converter("opset 9: Upsample, linear", graph('y = Upsample <mode = "linear"> (x, s)', 9, PICTURE, **SCALES)),
    converter("opset 9: Upsample, nearest", graph("y = Upsample(x, s)", 9, PICTURE, **SCALES)),
    converter("opset 7: Upsample, linear", graph(f'y = Upsample <mode = "linear", scales = {UP}> (x)', 7, PICTURE)),
    converter(
        "opset 10: Resize to fewer pixels, nearest, between two of them",
        graph("y = Resize(x, s)", 10, PICTURE, s=np.float32([1, 1, 0.6, 0.6])),
        refused="Resize is an operator that does not survive the conversion",
    ),
    converter("opset 11: Hardmax over several axes", graph("y = Hardmax(x)", 11, PICTURE)),
    converter("opset 12: Softmax over several axes", graph("y = Softmax <axis = 2> (x)", 12, PICTURE)),
    converter("opset 12: LogSoftmax over all", graph("y = LogSoftmax <axis = 0> (x)", 12, PICTURE)),
    converter(
        "opset 18: GroupNormalization, a scale for each group",
        graph("y = GroupNormalization <num_groups = 2> (x, g, c)", 18, PICTURE, **GROUPS),
    ),
    converter(
        "opset 8: BatchNormalization, statistics for each element",
        graph(
            "y = BatchNormalization <spatial = 0> (x, g, c, m, v)",
            8,
            "(float[b, 4, 5] x) => (float[b, 4, 5] y)",
            **STATISTICS,
        ),
    ),
    converter(
        "opset 9: BatchNormalization that trains",
        graph("y, n, u, p, q = BatchNormalization(x, g, g, g, g)", 9, g=np.float32([1, 2, 3, 4])),
        refused="BatchNormalization is an operator that cannot be converted",
    ),
    converter("opset 10: Dropout, its mask unread", graph("y, mask = Dropout <ratio = 0.3> (x)", 10)),
    converter(
        "opset 10: Dropout, its mask read",
        graph("t, m = Dropout(x) f = Cast <to = 1> (m) y = Add(t, f)", 10),
        refused="Dropout is an operator that does not survive the conversion",
    ),
    converter(
        "opset 9: Slice, Clip and Pad by attributes",
        graph(
            "c = Clip <max = 0.5> (x) s = Slice <axes = [1], starts = [1], ends = [3]> (c)"
            " y = Pad <pads = [0, 1, 0, 1]> (s)",
            9,
        ),
    ),
    converter("opset 11: operators in a branch", graph(NESTED, 11)),
    converter("opset 12: operators in a loop", graph(LOOP, 12)),
    converter(
        "IR version 3: weights are inputs, too",
        graph("y = MatMul(x, w)", 8, "(float[b, 4] x, float[4, 4] w) => (float[b, 4] y)", ir=3, w=np.eye(4, dtype="f")),
    ),
    converter(
        "the standard domain by its long name",
        changed(
            graph("y = Hardmax <axis = 0> (x)", 11), lambda model: setattr(model.opset_import[0], "domain", "ai.onnx")
        ),
    ),
    converter(
        "two opsets of one domain",
        changed(graph("y = Relu(x)", 11), lambda model: model.opset_import.append(make_opsetid("ai.onnx", 17))),
        refused="the model's opset cannot be compiled",
    ),
    converter("opset 6", graph("y = Relu(x)", 6), refused="the model's opset cannot be compiled"),
    converter("opset 28", graph("z = Cast <to = 7> (x) y = Cast <to = 1> (z)", 28)),
    converter(
        "an operator that its opset does not have",
        graph("y = Gelu(x)", 17),
        refused="No Op registered for Gelu with domain_version of 17",
    ),
    converter("an operator of ONNX Runtime without its opset", graph("y = com.microsoft.QuickGelu(x)", 17)),
    converter(
        "SimplifiedLayerNormalization, which ONNX Runtime's optimizer puts among the standard operators",
        graph("y = SimplifiedLayerNormalization <epsilon = 0.1> (x, g)", 21, g=np.float32([3, 0.5, 1, 2])),
    ),
    converter(
        "a local function, called without what has a default",
        changed(graph("y = my.Leaky(x)", 17, imports=', "my": 1'), function),
    ),
    converter("what rounding to float16 loses", graph(ROUNDED % 10, 17, k=np.float32(1000))),
    converter("what rounding to bfloat16 loses", graph(ROUNDED % 16, 17, k=np.float32(1000))),
    converter(
        "float16 that overflows",
        graph(
            "t = Mul(x, k) h = Cast <to = 10> (t) w = Cast <to = 1> (h) i = IsInf(w) y = Cast <to = 1> (i)",
            20,
            k=np.float32(65504),
        ),
    ),
    converter(
        "a sequence of float32",
        graph("s = SequenceConstruct(x, x) i = Constant <value = int64 {0}> () y = SequenceAt(s, i)", 17),
    ),
    converter("sparse weights", changed(LIKE, sparse), refused="sparse weights are not supported"),
    state("longrope below its switch", PHI, max_length=16),
    state(
        "longrope of a part of each head",
        rope(
            "phi3", {**LONGROPE, "short_factor": SHORT[:4], "long_factor": LONG[:4]}, partial_rotary_factor=0.5, **PHI3
        ),
        max_length=16,
    ),
    state("longrope without a limit", PHI, refused=SWITCHES),
    state("longrope and a limit beyond its switch", PHI, refused=SWITCHES, max_length=17),
    state(
        "longrope in old keys",
        config(
            PHI, rope_parameters=None, rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
        ),
        refused="--max-length 16",
    ),
    state("longrope in llama", rope("llama", INSIDE), max_length=16),
    state("longrope in one kind of layer", rope("gemma3_text", BOTH, **GEMMA), max_length=16),
    state("longrope in one kind of layer, without a limit", rope("gemma3_text", BOTH, **GEMMA), refused=SWITCHES),
    state("dynamic below its switch", LLAMA, max_length=16),
    state("dynamic without a limit", LLAMA, refused="--max-length 16"),
    state(
        "dynamic in old keys",
        config(LLAMA, rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}),
        refused=SWITCHES,
    ),
    Row(
        "longrope, an engine of the usual length",
        "state across calls",
        PHI,
        refused="up to 2048 tokens",
        fields={**EXACT, "builder": "kit"},
        target="sm89",
    ),
    state("yarn beyond its original length", rope("llama", YARN)),
    state("llama3 beyond its original length", rope("llama", {**LLAMA3, "original_max_position_embeddings": 8})),
    state("linear", rope("llama", {"rope_type": "linear", "factor": 3.0})),
    state(
        "an unknown kind of rotary table",
        config(rope("llama", YARN), rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        refused="a rope_type that is not known",
    ),
)
