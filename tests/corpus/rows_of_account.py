"""What a folder holds besides the parameters of a causal LM: other tensors, files, models and formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np

from instantrt.compiler.checkpoint import INDEX, SINGLE, read_checkpoint
from instantrt.passes.core.lazy import Array, whole
from instantrt.tools.bench.synthetic import write_safetensors
from tests.checkpoints import gptq_tensors, pack, write_checkpoint
from tests.corpus.row import Row
from tests.models import SIZES, make

Config = dict[str, Any]
Tensors = dict[str, Array]
Change = Callable[[Config, Tensors], None]
Maker = Callable[[Path], Path]
LAYER = "model.layers.0"
GROUP = 32
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


@cache
def base(family: str, fields: tuple[tuple[str, Any], ...]) -> tuple[Config, Tensors]:
    """A model of one layer: its config and its tensors."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        make(family, folder, **{"num_hidden_layers": 1, **dict(fields)})
        tensors = {key: whole(tensor) for key, tensor in read_checkpoint(folder).items()}
        return json.loads((folder / "config.json").read_text()), tensors


def changed(change: Change, family: str = "llama", **fields: Any) -> Maker:
    """The model with `change` made to its config and its tensors, in one file."""

    def write(folder: Path) -> Path:
        config, tensors = base(family, tuple(fields.items()))
        config, tensors = dict(config), dict(tensors)
        change(config, tensors)
        return write_checkpoint(folder, config, tensors)

    return write


def beside(files: dict[str, Any], then: Callable[[Path], None] = lambda folder: None, **fields: Any) -> Maker:
    """The model with other files beside it: JSON values, safetensors (a dictionary of arrays), or bytes."""

    def write(folder: Path) -> Path:
        changed(lambda config, tensors: None, **fields)(folder)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            elif name.endswith(".safetensors"):
                write_safetensors(folder / name, content)
            else:
                (folder / name).write_text(json.dumps(content))
        then(folder)
        return folder

    return write


def config_alone(**fields: Any) -> Maker:
    """A config with one tensor that belongs to no model: what it says is enough to be refused."""
    return lambda folder: write_checkpoint(folder, {**SIZES, **fields}, {"a": ONE})


def announced(method: str, dtype: Any = np.uint8, **fields: Any) -> Maker:
    """A checkpoint quantized by `method`, whose weights have another shape and type than the config says."""

    def change(config: Config, tensors: Tensors) -> None:
        config["quantization_config"] = {"quant_method": method, **fields}
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            tensors[name] = np.zeros((tensors[name].size // 2, 1), dtype)

    return changed(change)


def add(names: dict[str, Array]) -> Change:
    return lambda config, tensors: tensors.update(names)


def lose(*names: str) -> Change:
    def change(_config: Config, tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def prefixed(prefix: str) -> Change:
    def change(_config: Config, tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return change


def of_the_base_model(change: Change) -> Change:
    """Saved from the base model: no `model.` in front of a name."""

    def strip(config: Config, tensors: Tensors) -> None:
        change(config, tensors)
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    return strip


def gptq(config: Config, tensors: Tensors) -> None:
    """Every projection as four-bit GPTQ."""
    rng = np.random.default_rng(0)
    config["quantization_config"] = GPTQ
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        n, k = tensors.pop(name).shape
        groups = k // GROUP
        scale = rng.uniform(0.01, 0.05, (groups, n))
        codes, zero = rng.integers(0, 16, (k, n)), np.full((groups, n), 8)
        tensors |= gptq_tensors(name.removesuffix(".weight"), codes, zero, scale, 4)


def awq_with_scaled_activations(config: Config, tensors: Tensors) -> None:
    """AWQ of a model whose scales could not be folded: starcoder2's activation is divided by them."""
    config["quantization_config"] = AWQ
    for name in [name for name in tensors if name.endswith(("proj.weight", "c_fc.weight"))]:
        n, k = tensors.pop(name).shape
        path, groups = name.removesuffix(".weight"), k // GROUP
        tensors[f"{path}.qweight"] = pack(np.zeros((n, k), np.int64), 4).T.copy()
        tensors[f"{path}.qzeros"] = pack(np.zeros((n, groups), np.int64), 4).T.copy()
        tensors[f"{path}.scales"] = np.ones((groups, n), np.float16)
    tensors[f"{LAYER}.mlp.act.scales"] = np.full(128, 2, np.float16)


def two_embeddings(_config: Config, tensors: Tensors) -> None:
    tensors["embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 1


def another_head(_config: Config, tensors: Tensors) -> None:
    rng = np.random.default_rng(1)
    tensors["lm_head.weight"] = rng.normal(0, 0.15, tensors["model.embed_tokens.weight"].shape).astype(np.float32)


def the_same_head(_config: Config, tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()


def another_beta(_config: Config, tensors: Tensors) -> None:
    """A number of Apertus' activation, which is no parameter."""
    tensors[f"{LAYER}.mlp.act_fn.beta"] = np.array(0.9, ml_dtypes.bfloat16)


def buffers_of_old(_config: Config, tensors: Tensors) -> None:
    """What older versions of transformers saved with GPT-2."""
    tensors["transformer.h.0.attn.bias"] = np.tril(np.ones((1, 1, 128, 128), np.uint8))
    tensors["transformer.h.0.attn.masked_bias"] = np.array(-1e4, np.float32)


def norms_of_old(_config: Config, tensors: Tensors) -> None:
    """As TensorFlow called them, and as BERT's authors published it."""
    for name in [n for n in tensors if "LayerNorm" in n]:
        tensors[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = (
            tensors.pop(name)
        )


def shards(files: dict[str, tuple[str, ...]], index: dict[str, str] | None = None) -> Maker:
    """The model in shards, each with the tensors whose names contain one of its words."""

    def write(folder: Path) -> Path:
        changed(lambda config, tensors: None)(folder)
        tensors = {name: whole(tensor) for name, tensor in read_checkpoint(folder).items()}
        (folder / SINGLE).unlink()
        names = {file: [n for n in tensors if any(word in n for word in words)] for file, words in files.items()}
        for i, (file, held) in enumerate(names.items()):
            write_safetensors(folder / file, {name: tensors[name] + i for name in held})
        weight_map = {name: file for file, held in names.items() for name in held}
        (folder / INDEX).write_text(json.dumps({"weight_map": index or weight_map}))
        return folder

    return write


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def dangling(name: str) -> Callable[[Path], None]:
    """A folder of a cache, copied without what its links point to."""

    def link(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../../blobs/0a1b")

    return link


ONE = np.ones(3, np.float32)
SQUARE = np.ones((64, 64), np.float32)
Q_PROJ = f"{LAYER}.self_attn.q_proj"
LORA = {"adapter_config.json": {"peft_type": "LORA"}, "adapter_model.safetensors": {"a": ONE}}
STALE = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
ONE_SHARD = {"weight_map": dict.fromkeys(base("llama", ())[1], SINGLE)}

FILES = {
    "a single file beside the stale index of another save": (
        beside({INDEX: STALE}),
        f"both {SINGLE} and {INDEX} are here",
    ),
    "an index whose second shard was not downloaded": (
        shards({"a.safetensors": ("model",)}, {"x": "a.safetensors", "y": "b.safetensors"}),
        "shard b.safetensors is missing",
    ),
    "two shards that both hold a tensor, and differ": (
        shards({"a.safetensors": ("",), "b.safetensors": ("norm",)}),
        "is in two shards, and differs",
    ),
    "a LoRA adapter without its base": (
        beside(LORA, without("config.json", SINGLE)),
        "the base of the adapter is not here",
    ),
    "a LoRA adapter beside its base model": (beside(LORA), "a LoRA adapter (PEFT)"),
    "a sentence-transformers pipeline whose module is not known": (
        beside(
            {"modules.json": [{"type": f"sentence_transformers.models.{n}"} for n in ("Transformer", "WordWeights")]}
        ),
        "a sentence-transformers pipeline that has WordWeights",
    ),
    "a list of modules that was cut": (
        beside({"modules.json": b'[{"type": "a.Transformer"}, {"type": "a.Poo'}),
        "not a readable JSON file",
    ),
    "a link to weights that are not there": (beside({}, dangling(SINGLE)), "weights that are no file"),
    "a link to an adapter's config that is not there": (
        beside({}, dangling("adapter_config.json")),
        "adapter_config.json cannot be read",
    ),
    "a GGUF file that was cut": (beside({"model.gguf": b"GGUF"}, without("config.json", SINGLE)), "GGUF file's header"),
    "only weights of Mistral's own format": (
        beside({"consolidated.safetensors": {"a": ONE}, "params.json": {}}, without("config.json", SINGLE)),
        "in the format of the model's authors",
    ),
    "only pickled weights": (beside({"pytorch_model.bin": b"\x80"}, without(SINGLE)), "pickles are never loaded"),
    "a diffusers pipeline": (beside({"model_index.json": {}}, without("config.json")), "a diffusers pipeline"),
    "ModelOpt's hf_quant_config.json": (
        beside({"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}}),
        "quantized by modelopt cannot be read",
    ),
    "a config that names its weights' file": (
        changed(lambda config, tensors: config.update(transformers_weights="other.safetensors")),
        "config.json names the file of its weights",
    ),
    "weights quantized by quanto": (beside({"quanto_qmap.json": {}}), "quantized by quanto"),
}
TENSORS = {
    "AWQ of starcoder2 with scales of an activation": (
        changed(awq_with_scaled_activations, "starcoder2", use_bias=False),
        "AWQ's scales of an activation",
    ),
    "a LoRA adapter that is not merged": (
        changed(add({f"{Q_PROJ}.lora_A.default.weight": SQUARE[:8], f"{Q_PROJ}.lora_B.default.weight": SQUARE[:, :8]})),
        "an adapter (LoRA) that is not merged",
    ),
    "names as PEFT wraps them": (changed(prefixed("base_model.model.")), "names that begin with 'base_model.model.'"),
    "names as DataParallel wraps them": (changed(prefixed("module.")), "names that begin with 'module.'"),
    "names as a multimodal model wraps them": (
        changed(prefixed("language_model.")),
        "names that begin with 'language_model.'",
    ),
    "GPTQ with names as PEFT wraps them": (
        changed(lambda config, tensors: (gptq(config, tensors), prefixed("base_model.model.")(config, tensors))),  # type: ignore[func-returns-value]
        "names that begin with 'base_model.model.'",
    ),
    "a bias that the config does not announce": (
        changed(add({f"{Q_PROJ}.bias": SQUARE[0]})),
        "a bias that config.json does not announce",
    ),
    "norms that the model type does not have": (
        changed(add({f"{LAYER}.self_attn.q_norm.weight": SQUARE[0]})),
        "nothing uses tensor model.layers.0.self_attn.q_norm.weight",
    ),
    "one layer more than the config announces": (
        changed(add({"model.layers.1.input_layernorm.weight": SQUARE[0]})),
        "layer 1, and the config announces 1",
    ),
    "a lost norm": (changed(lose("model.norm.weight")), "the checkpoint has no tensor model.norm.weight"),
    "a classifier's head beside the language model's": (
        changed(add({"score.weight": SQUARE[:2]})),
        "a head that is no language model's",
    ),
    "two embeddings that differ, with and without prefix": (
        changed(two_embeddings),
        "two tensors for model.embed_tokens.weight, and they differ",
    ),
    "a layer both as GPTQ and as floats": (
        changed(lambda config, tensors: (gptq(config, tensors), add({f"{Q_PROJ}.weight": SQUARE})(config, tensors))),  # type: ignore[func-returns-value]
        "stored both quantized and as floats",
    ),
    "float8 weights that no config explains": (
        changed(add({f"{Q_PROJ}.weight": SQUARE.astype(ml_dtypes.float8_e4m3fn)})),
        "is not a float tensor",
    ),
}
MODELS = {
    "a reward model": ("internlm2", "InternLM2ForRewardModel", "a reward model"),
    "BertForPreTraining": ("bert", "BertForPreTraining", "a model with the heads of its training"),
    "T5EncoderModel": ("t5", "T5EncoderModel", "one half of an encoder and a decoder"),
    "an encoder with a causal LM's name": (
        "bert-generation",
        "BertGenerationDecoder",
        "is an encoder, which attends to both sides",
    ),
    "Phi4MultimodalForCausalLM": ("phi4_multimodal", "Phi4MultimodalForCausalLM", "reads more than text"),
    "LayoutLM, whose tokens stand on a page": (
        "layoutlm",
        "LayoutLMForTokenClassification",
        "reads more than tokens: where each token stands on a page",
    ),
    "TAPAS, which reads tables": (
        "tapas",
        "TapasForSequenceClassification",
        "reads more than tokens: rows and columns of a table",
    ),
    "RoCBert, which reads shapes": (
        "roc_bert",
        "RoCBertForSequenceClassification",
        "reads more than tokens: what each token looks like",
    ),
    "a BERT that says nothing of itself": ("bert", None, "is an encoder, which attends to both sides"),
    "T5ForConditionalGeneration": ("t5", "T5ForConditionalGeneration", "of an encoder and a decoder"),
    "BartForCausalLM": ("bart", "BartForCausalLM", "one half of an encoder and a decoder"),
    "Gemma3ForConditionalGeneration": ("gemma3", "Gemma3ForConditionalGeneration", "a model of pictures or sound"),
    "Qwen2VLForConditionalGeneration": ("qwen2_vl", "Qwen2VLForConditionalGeneration", "a model of pictures or sound"),
    "an Eagle draft model": ("llama", "LlamaForCausalLMEagle3", "a draft model of speculative decoding"),
    "architectures of another model type": (
        "llama",
        "MistralForCausalLM",
        "another model than the one that model_type",
    ),
    "MambaForCausalLM": ("mamba", "MambaForCausalLM", "keeps a state besides keys and values"),
    "a model type that nobody knows": ("nosuch", "NoSuchForCausalLM", "compiles no checkpoint of type 'nosuch'"),
    "MixtralForCausalLM": ("mixtral", "MixtralForCausalLM", "a mixture of experts"),
    "Qwen2MoeForCausalLM": ("qwen2_moe", "Qwen2MoeForCausalLM", "a mixture of experts"),
    "Qwen3MoeForCausalLM": ("qwen3_moe", "Qwen3MoeForCausalLM", "a mixture of experts"),
    "OlmoeForCausalLM": ("olmoe", "OlmoeForCausalLM", "a mixture of experts"),
    "PhimoeForCausalLM": ("phimoe", "PhimoeForCausalLM", "a mixture of experts"),
    "GraniteMoeForCausalLM": ("granitemoe", "GraniteMoeForCausalLM", "a mixture of experts"),
    "GPTJForCausalLM": ("gptj", "GPTJForCausalLM", "has attention of its own"),
    "FalconForCausalLM": ("falcon", "FalconForCausalLM", "has attention of its own"),
}
METHODS = {
    "bitsandbytes nf4": (announced("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"), "bitsandbytes"),
    "bitsandbytes int8, before methods had names": (
        changed(lambda config, tensors: config.update(quantization_config={"load_in_8bit": True})),
        "bitsandbytes",
    ),
    "fp8": (announced("fp8", ml_dtypes.float8_e4m3fn, fmt="e4m3", weight_block_size=[128, 128]), "fp8"),
    "nvfp4": (announced("modelopt", quant_algo="NVFP4"), "modelopt"),
    "mxfp4": (announced("mxfp4"), "mxfp4"),
    "HQQ": (announced("hqq"), "hqq"),
    "AQLM": (announced("aqlm", np.int8), "aqlm"),
    "torchao": (announced("torchao"), "torchao"),
    "AutoRound": (announced("auto-round", np.int32), "auto-round"),
    "MLX": (changed(lambda config, tensors: config.update(quantization={"group_size": 64, "bits": 4})), "mlx"),
}
RIGHT = {
    "tied embeddings, and another head in the file": changed(another_head, "llama-tied"),
    "tied embeddings, and the same head in the file": changed(the_same_head, "llama-tied"),
    "float weights saved from the base model": changed(of_the_base_model(lambda config, tensors: None), "llama-tied"),
    "GPTQ saved from the base model": changed(of_the_base_model(gptq), "llama-tied"),
    "BERT as a decoder, its norms named as in the first BERTs": changed(
        norms_of_old, "bert", is_decoder=True, num_key_value_heads=4
    ),
    "GPT-2 with the causal masks of older versions": changed(buffers_of_old, "gpt2", num_key_value_heads=4),
    "a buffer whose value is the file's": changed(another_beta, "apertus"),
    "an index that names the single file": beside({INDEX: ONE_SHARD}),
    "other formats and other folders beside the weights": beside(
        {
            "pytorch_model.bin": b"\x80",
            "model.gguf": b"GGUF",
            "model.fp16.safetensors": {"a": ONE},
            "adapters/adapter_model.safetensors": {"a": ONE},
            "hf_quant_config.json": {"producer": {}, "quantization": {"quant_algo": None}},
        }
    ),
}

ROWS = (
    *(Row(what, "files and tensors", make, refused) for what, (make, refused) in (FILES | TENSORS).items()),
    *(
        Row(what, "refusals", config_alone(model_type=kind, **({"architectures": [name]} if name else {})), refused)
        for what, (kind, name, refused) in MODELS.items()
    ),
    *(Row(what, "refusals", make, f"quantized by {method} cannot be read") for what, (make, method) in METHODS.items()),
    *(Row(what, "files and tensors", make) for what, make in RIGHT.items()),
)
