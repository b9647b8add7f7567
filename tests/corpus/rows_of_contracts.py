"""Operators that do less, or more, than the node they replace: masks, head sizes, kernels, blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx.numpy_helper import from_array

from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.json_file import read_json
from instantrt.passes.core.lazy import whole
from tests.checkpoints import gptq_tensors, write_checkpoint
from tests.corpus.row import Row
from tests.models import make

Make = Callable[[Path], Path]

# A causal LM as a graph: of each layer which keys [1, 1, 1, T] are `HIDDEN` from which queries [1, 1, S, 1], and the
# `MASK` [B, 1, S, T] that says so. A layer's names begin with L.
BY_CHANNEL: dict[str, Any] = {"group_size": -1, "lm_head": "float"}
CAUSAL = "L_hidden = Greater(L_keys, L_queries)"
PREFIX = "L_later = Greater(L_keys, L_queries) L_behind = Greater(L_keys, two) L_hidden = And(L_later, L_behind)"
ADDED = "L_mask = Where(L_unseen, lowest, none)"
CHOSEN = "L_mask = Not(L_unseen)"
SLOPED = """L_distance = Sub(L_keys, L_queries) L_far = Cast<to = 1>(L_distance) L_bias = Mul(L_far, slopes)
    L_mask = Where(L_unseen, lowest, L_bias)"""
LAYER = """
    L_total = Shape<start = 1, end = 2>(attention_mask)
    L_new = Shape<start = 1, end = 2>(input_ids)
    L_end = Squeeze(L_total)
    L_count = Squeeze(L_new)
    L_columns = Range(zero, L_end, one)
    L_rows = Range(zero, L_count, one)
    L_past = Sub(L_end, L_count)
    L_places = Add(L_rows, L_past)
    L_keys = Unsqueeze(L_columns, as_keys)
    L_queries = Unsqueeze(L_places, as_queries)
    HIDDEN
    L_wide = Unsqueeze(attention_mask, as_rows)
    L_padding = Equal(L_wide, zero)
    L_unseen = Or(L_hidden, L_padding)
    MASK
    L_q0 = MatMul(X, wq)
    L_k0 = MatMul(X, wk)
    L_v0 = MatMul(X, wv)
    L_q1 = Reshape(L_q0, q_heads)
    L_k1 = Reshape(L_k0, kv_heads)
    L_v1 = Reshape(L_v0, kv_heads)
    L_q = Transpose<perm = [0, 2, 1, 3]>(L_q1)
    L_k = Transpose<perm = [0, 2, 1, 3]>(L_k1)
    L_v = Transpose<perm = [0, 2, 1, 3]>(L_v1)
    "present.I.key" = Concat<axis = 2>("past_key_values.I.key", L_k)
    "present.I.value" = Concat<axis = 2>("past_key_values.I.value", L_v)
    L_y0 = Attention(L_q, "present.I.key", "present.I.value", L_mask)
    L_y1 = Transpose<perm = [0, 2, 1, 3]>(L_y0)
    L_y = Reshape(L_y1, together)
    L_o = MatMul(L_y, wo)
    Y = Add(X, L_o)"""


def masked(*layers: tuple[str, str]) -> Make:
    """A causal LM of layers that say what they hide, and as what kind of mask, as an .onnx file."""

    def write(folder: Path) -> Path:
        rng, caches = np.random.default_rng(0), [f"{i}.{part}" for i in range(len(layers)) for part in ("key", "value")]
        shapes = {
            "table": (160, 64),
            "places": (32, 64),
            "wq": (64, 64),
            "wk": (64, 32),
            "wv": (64, 32),
            "wo": (64, 64),
            "head": (64, 160),
        }
        values = {name: rng.normal(0, 0.15, shape).astype(np.float32) for name, shape in shapes.items()}
        values |= {"lowest": np.float32(-1e9), "none": np.float32(0)}
        values["slopes"] = np.geomspace(0.5, 0.01, 4, dtype=np.float32).reshape(1, 4, 1, 1)
        numbers = {"zero": 0, "one": 1, "two": 2, "as_keys": [0, 1, 2], "as_queries": [0, 1, 3], "as_rows": [1, 2]}
        heads = {"q_heads": [0, 0, 4, 16], "kv_heads": [0, 0, 2, 16], "together": [0, 0, 64]}
        values |= {name: np.asarray(value, np.int64) for name, value in (numbers | heads).items()}
        past, present = (
            ", ".join(f'float[batch, 2, {length}, 16] "{side}.{name}"' for name in caches)
            for side, length in (("past_key_values", "past"), ("present", "total"))
        )
        nodes = "what = Gather(table, input_ids) where = Gather(places, position_ids) x0 = Add(what, where)"
        for i, (hidden, mask) in enumerate(layers):
            text = (
                LAYER.replace("HIDDEN", hidden).replace("MASK", mask).replace("L_", f"l{i}_").replace(".I.", f".{i}.")
            )
            nodes += text.replace("X", f"x{i}").replace("Y", f"x{i + 1}")
        return saved(
            folder,
            "(int64[batch, sequence] input_ids, int64[batch, total] attention_mask, "
            f"int64[batch, sequence] position_ids, {past}) => (float[batch, sequence, 160] logits, {present})",
            f"{nodes} logits = MatMul(x{len(layers)}, head)",
            values,
            opset=23,
        )

    return write


def saved(folder: Path, interface: str, nodes: str, values: dict[str, Any], opset: int) -> Path:
    """A graph in ONNX's text syntax, as an .onnx file."""
    folder.mkdir(parents=True)
    head = f'<ir_version: 10, opset_import: ["": {opset}, "com.example": 1]> g '
    model = onnx.parser.parse_model(f"{head}{interface} {{ {nodes} }}")
    model.graph.initializer.extend(from_array(np.asarray(value), name) for name, value in values.items())
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def graph(interface: str, nodes: str, opset: int = 21, **values: Any) -> Make:
    return lambda folder: saved(folder, interface, nodes, values, opset)


def family(name: str, **fields: Any) -> Make:
    """A float checkpoint of one layer."""

    def write(folder: Path) -> Path:
        make(name, folder, **{"num_hidden_layers": 1, **fields})
        return folder

    return write


def gptq(bits: int, group_size: int = -1, *, order: bool = False, **fields: Any) -> Make:
    """A llama of one layer whose linears are random codes; `order`: each input has a group of its own."""

    def write(folder: Path) -> Path:
        floats, rng, stored = folder.with_name("float"), np.random.default_rng(0), {}
        make("llama", floats, num_hidden_layers=1, **fields)
        for name, tensor in read_checkpoint(floats).items():
            path = name.removesuffix(".weight")
            if not path.endswith("_proj"):
                stored[name] = whole(tensor)
                continue
            n, k = tensor.shape
            size = k if group_size == -1 else group_size
            zero, scale = rng.integers(1, 2**bits - 1, (k // size, n)), rng.uniform(0.5, 1, (k // size, n)) / 2**bits
            index = rng.permutation(k) // size if order else None
            stored |= gptq_tensors(path, rng.integers(0, 2**bits, (k, n)), zero, scale, bits, index)
        quantized = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": order, "sym": False}
        return write_checkpoint(folder, read_json(floats / "config.json") | {"quantization_config": quantized}, stored)

    return write


BY_48 = {"hidden_size": 96, "intermediate_size": 192}


def row(what: str, make_it: Make, refused: str = "", bound: float = 1e-4, **fields: Any) -> Row:
    return Row(what, "operator contracts", make_it, refused, fields, bound=bound)


ROWS = (
    row("Qwen3 with is_causal: false, as embedding models have it", family("qwen3", is_causal=False)),
    row("llama with is_causal: false and heads of 100", family("llama", is_causal=False, head_dim=100)),
    row("Mistral with is_causal: false: a window to both sides", family("mistral", is_causal=False)),
    row("heads of 20", family("qwen3", head_dim=20)),
    row("heads of 36, and int8 weights", family("qwen3", head_dim=36), bound=5e-3, quant="a16w8", **BY_CHANNEL),
    row("heads of 12, one of them for keys and values", family("llama", head_dim=12, num_key_value_heads=1)),
    row("a graph whose mask is causal", masked((CAUSAL, ADDED))),
    row("a graph whose first tokens see one another (a prefix LM)", masked((PREFIX, ADDED))),
    row(
        "a graph with a causal layer and one whose first tokens see one another",
        masked((CAUSAL, ADDED), (PREFIX, ADDED)),
    ),
    row("a graph whose mask is of truth values", masked((CAUSAL, CHOSEN))),
    row("a graph with a bias of its own for each head (ALiBi)", masked((CAUSAL, SLOPED))),
    row("GPTQ of 4 bits by channel, K = 96", gptq(4, hidden_size=96, head_dim=24), bound=1e-3),
    row("GPTQ of 4 bits by channel, K = 104: no block divides it", gptq(4, hidden_size=104), bound=1e-3),
    row("GPTQ of 4 bits in groups of 48, its inputs sorted", gptq(4, 48, order=True, **BY_48), bound=1e-3),
    row("GPTQ of 4 bits in groups of 8", gptq(4, 8), refused="group_size 8 is no multiple of 16"),
    row(
        "RoiAlign of opset 16: ONNX Runtime has it at 21, not at 23",
        graph(
            "(float[1, 4, 16, 16] x) => (float[2, 4, 3, 3] y)",
            "y = RoiAlign<output_height = 3, output_width = 3>(x, boxes, of)",
            16,
            boxes=np.array([[0, 0, 8, 8], [2, 2, 10, 12]], np.float32),
            of=np.zeros(2, np.int64),
        ),
    ),
    row(
        "GlobalLpPool, before an RMS norm that is one operator at opset 23 only",
        graph(
            "(float[2, 4, 8, 8] x) => (float[2, 4, 1, 1] y)",
            """a = GlobalLpPool(x) b = Pow(a, two) c = ReduceMean(b, axes) d = Add(c, tiny) e = Sqrt(d)
               f = Reciprocal(e) g = Mul(a, f) y = Mul(scale, g)""",
            18,
            two=np.float32(2),
            tiny=np.float32(1e-3),
            axes=np.array([-1]),
            scale=np.array([2], np.float32),
        ),
    ),
    row(
        "attentions whose nodes have no names, one of them with one bias for all keys",
        graph(
            "(float[b, 4, s, 8] q, float[b, 4, t, 8] k, float[b, 4, t, 8] v, float[b, 1, 1, t] m, float[b, 1, s, 1] n) "
            "=> (float[b, 4, s, 8] y0, float[b, 4, s, 8] y1, float[b, 4, s, 8] y2)",
            "".join(
                f"""kt{i} = Transpose<perm = [0, 1, 3, 2]>(k) a{i} = MatMul({query}, kt{i}) b{i} = Add(a{i}, {mask})
                    p{i} = Softmax(b{i}) y{i} = MatMul(p{i}, v) {follows} """
                for i, (query, mask, follows) in enumerate((("q", "m", "q1 = Neg(q)"), ("q1", "m", ""), ("q", "n", "")))
            ),
        ),
    ),
    row(
        "an RMS norm that drops the axis of its mean, and a GELU whose constants have three axes",
        graph(
            "(float[8, 8] x) => (float[1, 8, 8] y)",
            """a = Pow(x, two) b = ReduceMean<keepdims = 0>(a, last) c = Add(b, tiny) d = Sqrt(c) e = Reciprocal(d)
               f = Mul(x, e) g = Mul(scale, f)
               h = Div(g, root) i = Erf(h) j = Add(i, one) k = Mul(g, j) y = Mul(k, half)""",
            two=np.float32(2),
            last=np.array([-1]),
            tiny=np.float32(1e-3),
            scale=np.linspace(1, 2, 8, dtype=np.float32),
            root=np.float32(2**0.5),
            one=np.ones((1, 1, 1), np.float32),
            half=np.float32(0.5),
        ),
    ),
    row("HardSwish, a function of other operators", graph("(float[2, 8] x) => (float[2, 8] y)", "y = HardSwish(x)")),
    row(
        "a convolution in double",
        graph(
            "(double[1, 1, 8, 8] x) => (double[1, 1, 6, 6] y)", "y = Conv(x, w)", w=np.ones((1, 1, 3, 3), np.float64)
        ),
        refused="cast around Conv in the model: it has kernels for tensor(float)",
    ),
    row(
        "an operator of somebody's own, in a branch",
        graph(
            "(float[2] x, bool c) => (float[2] y)",
            "y = If(c)<then_branch = t () => (float[2] a) { a = Neg(x) }, "
            "else_branch = e () => (float[2] b) { b = com.example.Thing(x) }>",
        ),
        refused="com.example::Thing, which it does not know",
    ),
    row(
        "a vector times a matrix, int8 activations",
        graph("(float[64] x) => (float[64] y)", "y = MatMul(x, w)", w=np.eye(64, k=1, dtype=np.float32)),
        bound=2e-2,
        quant="a8w8",
    ),
    row(
        "matrices behind an Identity, int8 weights",
        graph(
            "(float[b, 64] x) => (float[b, 64] y)",
            "w1 = Identity(w) w2 = Identity(w1) a = MatMul(x, w1) y = Gemm(a, w2)",
            w=np.eye(64, k=1, dtype=np.float32),
        ),
        bound=2e-2,
        quant="a16w8",
    ),
    row(
        "a matrix without elements beside one that is quantized",
        graph(
            "(float[b, 64] x, float[b, 0] none) => (float[b, 64] y)",
            "a = MatMul(none, e) c = MatMul(x, w) y = Add(a, c)",
            e=np.zeros((0, 64), np.float32),
            w=np.eye(64, k=1, dtype=np.float32),
        ),
        bound=2e-2,
        quant="a16w8",
    ),
    Row(
        "an operator of ONNX Runtime alone, for a GPU",
        "operator contracts",
        graph("(float[b, 4] x) => (float[b, 4] y)", "y = com.microsoft.QuickGelu(x)"),
        "TensorRT has no com.microsoft::QuickGelu",
        {"builder": "kit"},
        target="sm89",
    ),
    Row(
        "Attention that holds its own cache, for a GPU",
        "operator contracts",
        graph(
            """(float[b, 4, s, 16] q, float[b, 4, s, 16] k, float[b, 4, s, 16] v, float[b, 4, p, 16] past_k,
                float[b, 4, p, 16] past_v)
               => (float[b, 4, s, 16] y, float[b, 4, t, 16] present_k, float[b, 4, t, 16] present_v)""",
            'y, present_k, present_v = Attention<is_causal = 1>(q, k, v, "", past_k, past_v)',
            23,
        ),
        refused="a cache, or lengths, inside the node",
        target="sm90",
    ),
)
