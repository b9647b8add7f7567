"""Heads, layers and schemes that only a name tells apart; and what the libraries below us raise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx.numpy_helper import from_array, to_array

from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.compile import compile_model
from instantrt.compiler.json_file import read_json
from instantrt.compiler.request import Request
from instantrt.passes.core.lazy import Array, InMemory, whole
from instantrt.passes.core.quant import InstantQuant, QuantTensor
from instantrt.passes.ort.tables import SCALE_TYPE
from tests.checkpoints import decoded, gptq_tensors, pack, weight, write_checkpoint
from tests.corpus.reference import INT8_INPUTS
from tests.corpus.row import Row, reference_of
from tests.models import make

Make = Callable[[Path], Path]
FLOAT32 = np.dtype(np.float32)


def family(name: str, **fields: Any) -> Make:
    """A float checkpoint of one layer."""

    def write(folder: Path) -> Path:
        make(name, folder, **{"num_hidden_layers": 1, **fields})
        return folder

    return write


def configured(**fields: Any) -> Make:
    """A float checkpoint of llama, whose config.json says something else."""

    def write(folder: Path) -> Path:
        file = family("llama")(folder) / "config.json"
        file.write_text(json.dumps(read_json(file) | fields))
        return folder

    return write


@dataclass(frozen=True)
class Stored:
    """How a layer lies in a compressed-tensors checkpoint: symmetric, in groups or per channel (-1)."""

    bits: int
    group_size: int = -1
    packed: bool = False
    int8_tokens: bool = False

    def group(self, targets: list[str]) -> dict[str, Any]:
        strategy = "channel" if self.group_size == -1 else "group"
        number = {"type": "int", "symmetric": True}
        weights = number | {"num_bits": self.bits, "strategy": strategy, "group_size": self.group_size}
        tokens = number | {"num_bits": 8, "strategy": "token", "dynamic": True}
        form = "pack-quantized" if self.packed else "int-quantized"
        activations = tokens if self.int8_tokens else None
        return {"targets": targets, "weights": weights, "input_activations": activations, "format": form}

    def tensors(self, path: str, w: Array) -> tuple[dict[str, Array], Array]:
        """What is stored for `w`, and what that stands for."""
        (n, k), top = w.shape, (1 << (self.bits - 1)) - 1
        groups = w.reshape(n, -1, k if self.group_size == -1 else self.group_size)
        scale = np.abs(groups).max(2, keepdims=True) / np.float32(top)
        codes = np.round(groups / scale).reshape(n, k)
        stored = {"weight_scale": scale[..., 0]}
        if self.packed:
            stored["weight_packed"] = np.ascontiguousarray(pack((codes + top + 1).T, self.bits).T)
            stored["weight_shape"] = np.array([n, k])
        else:
            stored["weight"] = codes.astype(np.int8)
        real = (codes.reshape(groups.shape) * scale).reshape(n, k).astype(np.float32)
        return {f"{path}.{name}": array for name, array in stored.items()}, real


W4, W4_BYTES, W8, W8_PACKED = Stored(4, 32, packed=True), Stored(8, 32), Stored(8), Stored(8, packed=True)
A8W8 = Stored(8, int8_tokens=True)


def compressed(
    groups: list[tuple[Stored, list[str]]], right: Mapping[str, Stored | None], ignore: tuple[str, ...] = ("lm_head",)
) -> Make:
    """A llama whose layers lie as the first of `right` says that their path has; its groups may fit them otherwise."""

    def write(folder: Path) -> Path:
        config = family("llama")(folder).joinpath("config.json")
        floats = {name: whole(t) for name, t in read_checkpoint(folder).items()}
        stored, real, int8 = dict(floats), dict(floats), []
        for path in (name.removesuffix(".weight") for name in floats if name.endswith("proj.weight")):
            how = next(how for part, how in right.items() if part in path)
            if how is not None:
                parts, real[f"{path}.weight"] = how.tensors(path, stored.pop(f"{path}.weight"))
                stored |= parts
                int8 += [path] * how.int8_tokens
        said = {f"group_{i}": how.group(targets) for i, (how, targets) in enumerate(groups)}
        form = {"format": "mixed-precision", "config_groups": said, "ignore": list(ignore)}
        write_checkpoint(reference_of(folder), read_json(config) | {INT8_INPUTS: int8}, real)
        quantization = {"quant_method": "compressed-tensors", "quantization_status": "compressed", **form}
        new = read_json(config) | {"quantization_config": quantization}
        for file in folder.iterdir():
            file.unlink()
        return write_checkpoint(folder, new, stored)

    return write


def gptq(dynamic: Mapping[str, Any], eight: str) -> Make:
    """A llama in 4 bits, its layers with `eight` in their path in 8."""

    def write(folder: Path) -> Path:
        config = read_json(family("llama")(folder) / "config.json")
        tensors = {name: whole(t) for name, t in read_checkpoint(folder).items()}
        for name in [n for n in tensors if n.endswith("proj.weight")]:
            path, w = name.removesuffix(".weight"), tensors.pop(name)
            bits = 8 if eight in path else 4
            (block,) = InstantQuant(path, InMemory(w), bits, 32, False, np.dtype(np.float16)).tiles()
            codes, scale, zero = block.parts
            tensors |= gptq_tensors(path, codes.T, zero.T, scale.T, bits, np.arange(w.shape[1]) // 32)
        said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "dynamic": dynamic}
        for file in folder.iterdir():
            file.unlink()
        return write_checkpoint(folder, config | {"quantization_config": said}, tensors)

    return write


def gptq_of_gpt2(folder: Path) -> Path:
    """GPT-2 in 4 bits, whose layers hold their floats as [K, N]; and what its codes stand for."""
    config = read_json(family("gpt2", num_key_value_heads=4)(folder) / "config.json")
    tensors = {name: whole(t) for name, t in read_checkpoint(folder).items()}
    real, fp16 = dict(tensors), np.dtype(np.float16)
    for name in [n for n in tensors if n.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))]:
        path, w = name.removesuffix(".weight"), np.ascontiguousarray(tensors.pop(name).T)
        rows = InstantQuant(path, InMemory(w), 4, 32, False, fp16)
        codes, scale, zero = decoded(quant := QuantTensor(path, rows, w.shape, 4, 32, False, fp16))
        tensors |= gptq_tensors(path, codes.T, zero.T, scale.T, 4)
        real[name] = np.ascontiguousarray(weight(quant).T)
    write_checkpoint(reference_of(folder), config, real)
    for file in folder.iterdir():
        file.unlink()
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    return write_checkpoint(folder, config | {"quantization_config": said}, tensors)


def mistral_of_two_kinds(folder: Path) -> Path:
    """Mistral whose config names its layers' kinds, and Ministral, as which transformers' AutoModel reads it."""
    config = read_json(family("mistral", num_hidden_layers=2)(folder) / "config.json")
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    of_ministral = config | {"model_type": "ministral", "architectures": ["MinistralForCausalLM"]}
    tensors = {name: whole(t) for name, t in read_checkpoint(folder).items()}
    write_checkpoint(reference_of(folder), of_ministral, tensors)
    return folder


def exported(change: Callable[[onnx.ModelProto], object], quantized: bool = False, **fields: Any) -> Make:
    """A llama as an .onnx file without names of modules; and what `a16w4` in groups of 32 makes of all but its head."""

    def write(folder: Path) -> Path:
        made = folder.with_name("made")
        asked = Request(family("llama", **fields)(made / "llama"), ("x86",), made / "out", portable=True, logits="all")
        (artifact,) = compile_model(asked)
        model = onnx.load(made / "out" / artifact.path)
        change(model)
        for node in model.graph.node:
            node.name = ""
        for place in (folder, reference_of(folder)) if quantized else (folder,):
            place.mkdir()
            onnx.save(model, place / "model.onnx")
            for tensor in (t for t in model.graph.initializer if t.name.endswith("proj.weight_kn")):
                w = np.ascontiguousarray(to_array(tensor).T)
                rows = InstantQuant(tensor.name, InMemory(w), 4, 32, False, SCALE_TYPE)
                real = weight(QuantTensor(tensor.name, rows, w.shape, 4, 32, False, SCALE_TYPE))
                tensor.CopyFrom(from_array(np.ascontiguousarray(real.T), tensor.name))
        return folder / "model.onnx"

    return write


def head_first(model: onnx.ModelProto) -> None:
    """Weights in another order than the layers: what is first, or last, is nothing to go by."""
    weights = list(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(reversed(weights))


def two_heads(model: onnx.ModelProto) -> None:
    """The logits are a sum of two products, as with an adapter of the head."""
    (head,) = (n for n in model.graph.node if n.output[0] == "logits")
    weight = next(t for t in model.graph.initializer if t.name == head.input[1])
    side = np.random.default_rng(0).standard_normal(tuple(weight.dims)).astype(np.float32)
    model.graph.initializer.append(from_array(side, "side"))
    head.output[0] = "main"
    model.graph.node.append(onnx.helper.make_node("MatMul", [head.input[0], "side"], ["other"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["main", "other"], ["logits"]))


def graph(
    body: str, values: Mapping[str, Array] | None = None, inputs: str = "float[b, 64] x", *, cut: bool = False
) -> Make:
    """An .onnx file in ONNX's text syntax; `cut`: with half the bytes of its weight."""

    def write(folder: Path) -> Path:
        folder.mkdir()
        model = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => (float[b, 64] y) {{ {body} }}'
        )
        given = {"w": np.eye(64, dtype=np.float32)} if values is None else values
        model.graph.initializer.extend(from_array(array, name) for name, array in given.items())
        if cut:
            model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[: 1 << 13]
        onnx.save(model, folder / "model.onnx")
        return folder / "model.onnx"

    return write


W4A16: dict[str, Any] = {"quant": "a16w4", "search": "none", "group_size": 32, "lm_head": "float"}
CT: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "int-quantized"}
LINEAR: dict[str, Any] = W8.group(["Linear"])

ROWS = (
    Row(
        "a vocabulary as wide as the hidden size", "identity", family("llama", vocab_size=64), bound=2e-4, fields=W4A16
    ),
    Row("a vocabulary as wide as the MLP", "identity", family("llama", vocab_size=128), fields=W4A16),
    Row(
        "a vocabulary as wide as the MLP, an int8 head",
        "identity",
        family("llama", vocab_size=128),
        fields=W4A16 | {"lm_head": "int8", "embeddings": "stored"},
    ),
    Row(
        "a vocabulary as wide as the MLP, a tied head",
        "identity",
        family("llama-tied", vocab_size=128),
        fields=W4A16,
        bound=2e-4,  # two limbs lose 2e-5 of each layer's input, here 7e-5 of all logits: the worst of them is 1.0e-4
    ),
    Row("a head with a bias, as wide as the MLP", "identity", family("phi", vocab_size=128), fields=W4A16),
    Row(
        "a head that the file calls embed_out, as wide as the MLP",
        "identity",
        family("gpt_neox", vocab_size=128),
        fields=W4A16,
    ),
    Row(
        ".onnx: a head without a name, as wide as the MLP, its weight not the last",
        "identity",
        exported(head_first, quantized=True, vocab_size=128),
        fields=W4A16,
    ),
    Row(".onnx: logits that are a sum of two products", "identity", exported(two_heads)),
    Row(
        "compressed-tensors: `Linear` A8W8, then a pattern A16W8",
        "identity",
        compressed([(A8W8, ["Linear"]), (W8, ["re:.*down_proj$"])], {"down_proj": W8, "": A8W8}),
        bound=1e-3,
    ),
    Row(
        "compressed-tensors: `Linear` in 4 bits, then a pattern in 8",
        "identity",
        compressed([(W4, ["Linear"]), (W8_PACKED, ["re:.*self_attn"])], {"self_attn": W8_PACKED, "": W4}),
        bound=1e-3,
    ),
    Row(
        "compressed-tensors: a pattern, then the path of a layer that fits it",
        "identity",
        compressed(
            [(A8W8, ["re:.*proj"]), (W8, ["model.layers.0.mlp.down_proj"])],
            {"down_proj": W8, "": A8W8},
        ),
        bound=1e-3,
    ),
    Row(
        "compressed-tensors: two patterns fit, the later one is first by alphabet",
        "identity",
        compressed([(A8W8, ["re:model.*"]), (W8, ["re:.*mlp"])], {"mlp": W8, "": A8W8}),
        bound=1e-3,
    ),
    Row(
        "compressed-tensors: a pattern that fits the beginning of a path",
        "identity",
        compressed([(W4_BYTES, ["re:model.layers.0.self"]), (W4, ["Linear"])], {"self_attn": W4_BYTES, "": W4}),
        bound=1e-3,
    ),
    Row(
        "compressed-tensors: a class that all layers inherit from, and one that none is of",
        "identity",
        compressed([(A8W8, ["LlamaMLP"]), (W8, ["Module"])], {"": W8}),
        bound=1e-3,
    ),
    Row(
        "compressed-tensors: an ignored layer that a target names",
        "identity",
        compressed(
            [(W8, ["Linear", "re:.*down_proj"])], {"down_proj": None, "": W8}, ignore=("lm_head", "re:.*down_proj")
        ),
        bound=1e-3,
    ),
    Row(
        "compressed-tensors: a layer that no target means, quantized all the same",
        "identity",
        compressed([(W8, ["re:.*mlp"])], {"": W8}),
        refused="the config leaves this module float, the checkpoint holds it quantized",
    ),
    Row(
        "compressed-tensors: an ignored layer, quantized all the same",
        "identity",
        compressed([(W8, ["Linear"])], {"": W8}, ignore=("lm_head", "re:.*up_proj")),
        refused="the config leaves this module float, the checkpoint holds it quantized",
    ),
    Row(
        "GPTQ: two patterns of `dynamic` fit, the first counts",
        "identity",
        gptq({"+:.*mlp": {"bits": 8}, ".*up_proj": {"bits": 4}}, eight="mlp"),
        fields={"weight_only": True},
        bound=1e-3,
    ),
    Row(
        "GPTQ: a negative pattern after a positive one that fits",
        "identity",
        gptq({".*mlp": {"bits": 8}, "-:.*up_proj": {}}, eight="mlp"),
        fields={"weight_only": True},
        bound=1e-3,
    ),
    Row("GPTQ of GPT-2, whose layers hold their floats transposed", "identity", gptq_of_gpt2),
    Row("Mistral whose config names its layers' kinds, as Ministral's does", "identity", mistral_of_two_kinds),
    Row(
        ".onnx: int8 for the head of a graph that has none",
        "identity",
        graph("y = MatMul(x, w)"),
        refused="lm_head int8 does nothing",
        fields={"quant": "a16w8", "lm_head": "int8"},
    ),
    Row(
        ".onnx: int8 for the tables, the only one has positions",
        "identity",
        graph("y = Gather(table, position_ids)", {"table": np.zeros((90, 64), np.float32)}, "int64[b] position_ids"),
        refused="no tokens pick its rows",
        fields={"embeddings": "int8"},
    ),
    Row(
        "compressed-tensors: quantized outputs",
        "refusals",
        configured(quantization_config=CT | {"config_groups": {"a": LINEAR | {"output_activations": {"num_bits": 8}}}}),
        refused="quantized outputs are not supported",
    ),
    Row(
        "compressed-tensors: a quantized cache",
        "refusals",
        configured(quantization_config=CT | {"config_groups": {"a": LINEAR}, "kv_cache_scheme": {"num_bits": 8}}),
        refused="a quantized cache",
    ),
    Row(
        "compressed-tensors: a key that the format does not have",
        "refusals",
        configured(quantization_config=CT | {"config_groups": {"a": LINEAR | {"rotation": "hadamard"}}}),
        refused="keys of a config group that are not read",
    ),
    Row(
        "compressed-tensors: blocks of fp8",
        "refusals",
        configured(quantization_config=CT | {"format": "float-quantized", "config_groups": {"a": {"targets": []}}}),
        refused="compressed-tensors format",
    ),
    Row(
        "GPTQ of 3 bits",
        "refusals",
        configured(quantization_config={"quant_method": "gptq", "bits": 3, "group_size": 32}),
        refused="GPTQ bits",
    ),
    Row(
        "GPTQ of a model that GPTQModel rotated",
        "refusals",
        configured(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32, "rotation": "hadamard"}),
        refused="a checkpoint whose rotation rotates inputs as the model runs",
    ),
    Row(
        "GPTQ with an adapter for a layer in `dynamic`",
        "refusals",
        configured(
            quantization_config={
                "quant_method": "gptq",
                "bits": 4,
                "group_size": 32,
                "dynamic": {".*up_proj": {"adapter": {"rank": 8}}},
            }
        ),
        refused="a module with overrides that are not read",
    ),
    Row(
        "codegen, which torch cannot export with a cache",
        "refusals",
        family("codegen", n_head=4, n_embd=64, n_layer=1, n_inner=128, rotary_dim=16),
        refused="exporting CodeGenForCausalLM (codegen) to ONNX failed",
    ),
    Row(
        "deepseek_v3, whose cache has another shape than its heads",
        "refusals",
        family("deepseek_v3", num_key_value_heads=4, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16),
        refused="exporting DeepseekV3ForCausalLM (deepseek_v3) to ONNX failed",
    ),
    Row(
        "llama with a hidden size of a word",
        "refusals",
        configured(hidden_size="many"),
        refused="transformers cannot build LlamaForCausalLM (llama) from this config",
    ),
    Row(
        "Gemma 4, whose layers have heads of two sizes",
        "refusals",
        configured(model_type="gemma4_text", architectures=["Gemma4ForCausalLM"]),
        refused="has layers whose caches differ in shape: head_dim",
    ),
    Row(
        "llama with more layers than there is time for",
        "refusals",
        configured(num_hidden_layers=1 << 40),
        refused="num_hidden_layers is more than any model has",
    ),
    Row(
        ".onnx: an operator with an input too few",
        "refusals",
        graph("y = MatMul(x)"),
        refused="a node that its operator does not allow",
    ),
    Row(
        ".onnx: an operator of no domain that is known",
        "refusals",
        graph("y = my.Op(x)"),
        refused="No opset import for domain 'my'",
    ),
    Row(
        ".onnx: an output that has the name of a tensor inside, as torch may write it",
        "refusals",
        graph("y = MatMul(x, w) y = Relu(y)"),
        refused="y: two tensors have one name",
    ),
    Row(
        ".onnx: tensors that are made of themselves",
        "refusals",
        graph("a = MatMul(y, w) y = Relu(a)"),
        refused="tensors are made of themselves",
    ),
    Row(
        ".onnx: a node that reads what nothing makes",
        "refusals",
        graph("y = MatMul(z, w)"),
        refused="z: a tensor that nothing makes",
    ),
    Row(
        ".onnx: an input that is a sequence of tensors",
        "refusals",
        graph("y = SequenceAt(s, i)", {"i": np.array(0)}, "seq(float[b, 64]) s"),
        refused="an input or output that is no tensor",
    ),
    Row(
        ".onnx: a weight that is shorter than its shape",
        "refusals",
        graph("y = MatMul(x, w)", cut=True),
        refused="reading the graph failed",
    ),
)
