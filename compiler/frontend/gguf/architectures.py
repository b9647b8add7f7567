"""What a GGUF file's metadata and tensor names say, in transformers' words: its config.json, and where tensors belong.

The keys are llama.cpp's (docs/facts.md, "What GGUF's metadata means"). Every key of the architecture's prefix is
used, harmless with a reason, or refused by name, and so is every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instantrt.compiler.frontend.architecture import MOST_LAYERS
from instantrt.compiler.frontend.gguf.values import Keys
from instantrt.passes.core.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
Vectors = Callable[[str], NDArray[np.float32]]  # name -> the numbers of a small float tensor
Sizes = Mapping[str, int]

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
HARMLESS_TENSORS = dict.fromkeys((FREQS, LONG, SHORT), "of the rotary table, which the config describes")
HARMLESS_KEYS = {
    "rope.scaling.finetuned": "whether it was trained with the scaling, which changes no number",
    "rope.scaling.original_context_length": "used by the kinds of scaling that have it",
    "tensor_data_layout": "of the weights before the conversion",
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27 B, whose scores are scaled by hidden size / heads
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}  # llama.cpp's, of a file that has none
SAME = 1e-5  # two ways to compute a factor in float32


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs in transformers' model, and what a converter did to it.

    heads   llama.cpp interleaved the two halves of each of so many heads' rows; 0: it did not
    less    what to take from each number: the 1 that it added to Gemma's norms
    """

    name: str
    heads: int = 0
    less: float = 0.0


@dataclass(frozen=True)
class ModuleOf:
    """A module of transformers, and its weight's shape in letters (`sizes_of`)."""

    module: str
    shape: str


@dataclass(frozen=True)
class Architecture:
    """transformers' side of one of llama.cpp's architectures.

    biases   modules that have a bias together -> the config's key that says so, "" where they have it always
    own      the keys of the config that only this architecture has
    scalings   of the rotary embedding, as transformers' model can do them
    """

    model_type: str
    model: str
    layer: Mapping[str, ModuleOf]
    biases: Mapping[tuple[str, ...], str]
    own: Callable[[Keys, Sizes], dict[str, Any]]
    interleaved: bool = False
    less: float = 0.0
    partial: bool = False
    free_head: bool = True
    divides: bool = False
    scalings: tuple[str, ...] = ("none", "linear", "yarn", "longrope")


WHOLE = {
    "token_embd": ModuleOf("model.embed_tokens", "VH"),
    "output_norm": ModuleOf("model.norm", "H"),
    "output": ModuleOf("lm_head", "VH"),
}
PLAIN = {
    "attn_norm": ModuleOf("input_layernorm", "H"),
    "attn_q": ModuleOf("self_attn.q_proj", "QH"),
    "attn_k": ModuleOf("self_attn.k_proj", "KH"),
    "attn_v": ModuleOf("self_attn.v_proj", "KH"),
    "attn_output": ModuleOf("self_attn.o_proj", "HQ"),
    "ffn_norm": ModuleOf("post_attention_layernorm", "H"),
    "ffn_gate": ModuleOf("mlp.gate_proj", "FH"),
    "ffn_up": ModuleOf("mlp.up_proj", "FH"),
    "ffn_down": ModuleOf("mlp.down_proj", "HF"),
}
NORMED = {"attn_q_norm": ModuleOf("self_attn.q_norm", "D"), "attn_k_norm": ModuleOf("self_attn.k_norm", "D")}
GEMMA = {
    **PLAIN,
    "post_attention_norm": ModuleOf("post_attention_layernorm", "H"),
    "ffn_norm": ModuleOf("pre_feedforward_layernorm", "H"),
    "post_ffw_norm": ModuleOf("post_feedforward_layernorm", "H"),
}
FUSED = {
    "attn_norm": PLAIN["attn_norm"],
    "attn_qkv": ModuleOf("self_attn.qkv_proj", "TH"),
    "attn_output": PLAIN["attn_output"],
    "ffn_norm": PLAIN["ffn_norm"],
    "ffn_up": ModuleOf("mlp.gate_up_proj", "GH"),
    "ffn_down": PLAIN["ffn_down"],
}
INTERLEAVED = {"attn_q": "heads", "attn_k": "kv_heads"}
QKV: tuple[str, ...] = ("attn_q", "attn_k", "attn_v")
ATTENTION_BIAS: Mapping[tuple[str, ...], str] = {(*QKV, "attn_output"): "attention_bias"}


def config_of(metadata: Mapping[str, Any], tensors: Shapes, vectors: Vectors, where: str) -> dict[str, Any]:
    """The config.json of a file; `tensors` are name -> shape [rows, columns], `vectors` reads rope's factors."""
    architecture, keys = opened(metadata, where)
    sizes = sizes_of(architecture, keys, tensors)
    own = architecture.own(keys, sizes)
    rope = rotary(architecture, keys, sizes, tensors, vectors)
    config = {
        "model_type": architecture.model_type,
        "architectures": [architecture.model],
        "dtype": "float32",
        "hidden_size": sizes["H"],
        "intermediate_size": sizes["F"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "vocab_size": sizes["V"],
        "max_position_embeddings": sizes["context"],
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": rope,
        **({"head_dim": sizes["D"]} if architecture.free_head else {}),
        **{flag: has_bias(group, tensors) for group, flag in architecture.biases.items() if flag},
        **special_ids(metadata, sizes["V"], where),
    }
    if own.get("model_type") == "mistral" and config["attention_bias"]:
        raise UserError("biases beside a sliding window", where=where, expected="one of them: no model has both")
    refuse_others(keys, sizes)
    keys.refuse_rest(HARMLESS_KEYS)
    return config | own


def places_of(metadata: Mapping[str, Any], tensors: Shapes, where: str) -> dict[str, Place]:
    """Where each tensor belongs; every shape is checked, and a tensor that is missing or that nobody knows refused."""
    architecture, keys = opened(metadata, where)
    sizes = sizes_of(architecture, keys, tensors)
    found = {}
    for name, place, shape in expected_tensors(architecture, sizes, tensors):
        if name not in tensors:
            raise UserError(f"there is no tensor {name}", where=where, expected=str(list(shape)))
        if tuple(tensors[name]) != shape:
            raise UserError(
                f"the shape of {name} is not what the metadata says",
                where=where,
                expected=str(list(shape)),
                found=str(list(tensors[name])),
            )
        found[name] = place
    for name in tensors:
        if name not in found and name not in HARMLESS_TENSORS:
            raise UserError(
                f"{name}: nothing is known to do with this tensor",
                where=where,
                expected=f"tensors of {keys.prefix}: {', '.join([*WHOLE, *architecture.layer])}",
                found=str(list(tensors[name])),
            )
    return found


def opened(metadata: Mapping[str, Any], where: str) -> tuple[Architecture, Keys]:
    """Its architecture; what is no language model of those that there are is refused."""
    general = Keys(metadata, "general", where)
    name = general.text("architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError("there is no road for this architecture", where=where, expected=known, found=repr(name[:60]))
    if general.text("type", "model") != "model":
        raise general.refusal("type", "'model'", metadata["general.type"])
    return ARCHITECTURES[name], Keys(metadata, name, where)


def sizes_of(architecture: Architecture, keys: Keys, tensors: Shapes) -> Sizes:
    """Sizes by the letters of `ModuleOf.shape`.

    V tokens, H the residual's, D of a head, Q of all query heads, K of all key heads, F of the MLP, T = Q + 2 K and
    G = 2 F of fused matrices.
    """
    experts = keys.integer("expert_count", 0, least=0), keys.integer("expert_used_count", 0, least=0)
    if any(experts):
        what = "a mixture of experts: there is no road for it yet"
        raise UserError(what, where=keys.where, found=f"{keys.prefix}.expert_count {experts[0]}")
    layers = keys.integer("block_count", most=MOST_LAYERS)
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads, most=heads)
    if heads % kv_heads:
        raise keys.refusal("attention.head_count_kv", f"a divisor of {heads}, the attention.head_count", kv_heads)
    if hidden % heads and (architecture.divides or "attention.key_length" not in keys):
        raise keys.refusal("attention.head_count", f"a divisor of {hidden}, the embedding_length", heads)
    head = keys.integer("attention.key_length", hidden // heads)
    if not architecture.free_head and head != hidden // heads:
        raise keys.refusal("attention.key_length", f"{hidden // heads}: transformers' model has no other", head)
    if keys.integer("attention.value_length", head) != head:
        raise keys.refusal("attention.value_length", f"{head}, the key_length", keys.value("attention.value_length"))
    ffn = keys.integer("feed_forward_length")
    vocabulary = rows_of_embedding(keys, tensors)
    return {
        **{"layers": layers, "heads": heads, "kv_heads": kv_heads, "context": keys.integer("context_length")},
        **{"V": vocabulary, "H": hidden, "D": head, "Q": heads * head, "K": kv_heads * head},
        **{"F": ffn, "G": 2 * ffn, "T": (heads + 2 * kv_heads) * head},
    }


def rows_of_embedding(keys: Keys, tensors: Shapes) -> int:
    """How many tokens there are: what the tensor, the tokenizer and the metadata say must be one."""
    shape = tensors.get("token_embd.weight", ())
    if len(shape) != 2 or shape[0] < 1:
        raise UserError("no tensor token_embd.weight [tokens, sizes]", where=keys.where, found=str(list(shape)))
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    counted = {"the list tokenizer.ggml.tokens": len(tokens)} if isinstance(tokens, list) else {}
    if "vocab_size" in keys:
        counted[f"{keys.prefix}.vocab_size"] = keys.integer("vocab_size")
    for what, count in counted.items():
        if count != shape[0]:
            raise UserError(
                f"{what} and the rows of token_embd.weight differ",
                where=keys.where,
                expected=str(shape[0]),
                found=str(count),
            )
    return shape[0]


def refuse_others(keys: Keys, sizes: Sizes) -> None:
    """Refuses what a key may say that transformers' models cannot do."""
    if not keys.flag("attention.causal", True):
        raise keys.refusal("attention.causal", "true: a model that attends to both sides has no road", False)
    if keys.integer("pooling_type", 0, least=0):
        raise keys.refusal("pooling_type", "0: a model of embeddings has no road", keys.value("pooling_type"))
    plain = sizes["D"] ** -0.5
    if not math.isclose(keys.number("attention.scale", plain), plain, rel_tol=SAME):
        raise keys.refusal("attention.scale", f"{plain}, 1 / sqrt({sizes['D']})", keys.value("attention.scale"))


def expected_tensors(
    architecture: Architecture, sizes: Sizes, tensors: Shapes
) -> Iterator[tuple[str, Place, tuple[int, ...]]]:
    """Name, place and shape of each tensor; of output.weight only where there is one."""
    biased = {
        each for group, flag in architecture.biases.items() if not flag or has_bias(group, tensors) for each in group
    }
    rows = [
        (name, row, row.module, name) for name, row in WHOLE.items() if name != "output" or "output.weight" in tensors
    ]
    for i in range(sizes["layers"]):
        rows += [
            (f"blk.{i}.{name}", row, f"model.layers.{i}.{row.module}", name) for name, row in architecture.layer.items()
        ]
    for full, row, module, name in rows:
        shape = tuple(sizes[letter] for letter in row.shape)
        heads = sizes[INTERLEAVED[name]] if architecture.interleaved and name in INTERLEAVED else 0
        less = architecture.less if len(shape) == 1 else 0.0
        yield f"{full}.weight", Place(f"{module}.weight", heads, less), shape
        if name in biased:
            yield f"{full}.bias", Place(f"{module}.bias", heads), shape[:1]


def has_bias(group: tuple[str, ...], tensors: Shapes) -> bool:
    return any(f"blk.0.{name}.bias" in tensors for name in group)


def special_ids(metadata: Mapping[str, Any], tokens: int, where: str) -> dict[str, int | None]:
    """Ids of the beginning, the end and the padding: null where there are none, not transformers' defaults."""
    keys = Keys(metadata, "tokenizer.ggml", where)
    default = SENTENCEPIECE_IDS if metadata.get("tokenizer.ggml.model") == "llama" else {}
    found: dict[str, int | None] = {}
    for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("pad", "padding_token_id")):
        given = key in keys or name in default
        found[f"{name}_token_id"] = keys.integer(key, default.get(name), least=0, most=tokens - 1) if given else None
    return found


def rotary(architecture: Architecture, keys: Keys, sizes: Sizes, tensors: Shapes, vectors: Vectors) -> dict[str, Any]:
    """transformers' rope_parameters."""
    base, width = keys.number("rope.freq_base", 10000.0), keys.integer("rope.dimension_count", sizes["D"])
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if width != sizes["D"]:
        part = width / sizes["D"]
        if not architecture.partial or width % 2 or int(sizes["D"] * part) != width or width > sizes["D"]:
            raise keys.refusal("rope.dimension_count", f"{sizes['D']}, the size of a head", width)
        found["partial_rotary_factor"] = part
    found |= scaling(architecture, keys, sizes, tensors, vectors, base, width)
    if architecture.model_type != "gemma3_text":
        return found
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    return {"full_attention": found, "sliding_attention": local}


def scaling(
    architecture: Architecture, keys: Keys, sizes: Sizes, tensors: Shapes, vectors: Vectors, base: float, width: int
) -> dict[str, Any]:
    """The keys of rope_parameters that change the rotary table."""
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    factors = {
        name: factors_of(name, vectors, tensors, width, keys.where) for name in (FREQS, LONG, SHORT) if name in tensors
    }
    implied = "longrope" if LONG in factors or SHORT in factors else "linear" if factor != 1 else "none"
    kind = keys.text("rope.scaling.type", implied)
    if kind not in architecture.scalings:
        raise keys.refusal("rope.scaling.type", ", ".join(architecture.scalings), kind)
    due = {"longrope": {LONG, SHORT}, "none": {FREQS} & set(factors)}.get(kind, set())
    if set(factors) != due:
        raise UserError(
            f"the tensors of rotary factors do not go with the scaling {kind!r}",
            where=keys.where,
            expected=", ".join(sorted(due)) or "none",
            found=", ".join(sorted(factors)) or "none",
        )
    if kind in ("none", "linear") and attention != 1:
        raise keys.refusal("rope.scaling.attn_factor", f"1, with the scaling {kind!r}", attention)
    if kind == "none" and factor != 1:
        raise keys.refusal("rope.scaling.factor", "1, without a scaling", factor)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    if kind == "yarn":
        return yarn(keys, sizes, factor, attention)
    if kind == "longrope":
        original = keys.integer("rope.scaling.original_context_length", sizes["context"])
        return longrope(factors[LONG], factors[SHORT], attention, original)
    return llama3(factors[FREQS], base, width, sizes) if FREQS in factors else {}


def factors_of(name: str, vectors: Vectors, tensors: Shapes, width: int, where: str) -> NDArray[np.float32]:
    """One positive number for each pair of rotated features."""
    if tuple(tensors[name]) != (width // 2,):
        raise UserError(f"the shape of {name}", where=where, expected=str([width // 2]), found=str(list(tensors[name])))
    found = np.asarray(vectors(name), np.float32)
    if not (np.isfinite(found) & (found > 0)).all():
        raise UserError(f"{name}: rotary factors", where=where, expected="positive numbers", found=str(found.min()))
    return found


def yarn(keys: Keys, sizes: Sizes, factor: float, attention: float) -> dict[str, Any]:
    """YaRN. llama.cpp's attn_factor multiplies what the paper has by default."""
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", sizes["context"]),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    for key, only in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0)):
        if keys.number(f"rope.scaling.{key}", only) != only:
            raise keys.refusal(f"rope.scaling.{key}", str(only), keys.value(f"rope.scaling.{key}"))
    usual = 0.1 * math.log(max(factor, 1.0)) + 1
    return found | ({"attention_factor": attention * usual} if attention != 1 else {})


def longrope(long: NDArray[np.float32], short: NDArray[np.float32], attention: float, original: int) -> dict[str, Any]:
    """One list of factors up to `original` tokens, another behind."""
    return {
        "rope_type": "longrope",
        "factor": 1.0,  # of no use beside attention_factor, but transformers warns where it is missing
        "long_factor": long.tolist(),
        "short_factor": short.tolist(),
        "attention_factor": attention,
        "original_max_position_embeddings": original,
    }


def llama3(factors: NDArray[np.float32], base: float, width: int, sizes: Sizes) -> dict[str, Any]:
    """Llama 3's scaling where it has just these factors; else a longrope whose two lists are one."""
    factor = float(factors.max())
    waves = 2 * math.pi * base ** (np.arange(0, width, 2, dtype=np.float32) / width)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((LLAMA3["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=SAME, atol=0):
        return {"rope_type": "llama3", "factor": factor, **LLAMA3} if factor != 1 else {}
    return longrope(factors, factors, 1.0, sizes["context"])


def no_window(keys: Keys, _: Sizes) -> dict[str, Any]:
    if keys.integer("attention.sliding_window", 0, least=0):
        found = keys.value("attention.sliding_window")
        raise keys.refusal("attention.sliding_window", "0: which layers have the window is not said", found)
    return {}


def mistral(keys: Keys, _: Sizes) -> dict[str, Any]:
    """llama.cpp calls Mistral's models llama too: those with a window are told by it."""
    window = keys.integer("attention.sliding_window", 0, least=0)
    if not window:
        return {}
    return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}


def phi3(keys: Keys, sizes: Sizes) -> dict[str, Any]:
    original = keys.integer("rope.scaling.original_context_length", sizes["context"])
    window = keys.integer("attention.sliding_window", 0, least=0)
    return {"original_max_position_embeddings": original, "sliding_window": window or None}


def gemma2(keys: Keys, sizes: Sizes) -> dict[str, Any]:
    return {
        **gemma(keys, sizes, period=2, window=4096),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


def gemma3(keys: Keys, sizes: Sizes) -> dict[str, Any]:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return gemma(keys, sizes, period=6, window=0) | {key: keys.number(key) for key in caps if key in keys}


def gemma(keys: Keys, sizes: Sizes, *, period: int, window: int) -> dict[str, Any]:
    """Gemma's windows, one layer of `period` without, and the scale of its scores, 1 / sqrt(query_pre_attn_scalar)."""
    window = keys.integer("attention.sliding_window", window, least=0)
    layers, key = sizes["layers"], "attention.sliding_window_pattern"
    if isinstance(keys.metadata.get(f"{keys.prefix}.{key}"), list):
        slides = keys.list(key, bool)
        if len(slides) != layers:
            raise keys.refusal(key, f"one entry for each of {layers} layers", slides)
    else:
        period = keys.integer(key, period)
        slides = [(i + 1) % period != 0 for i in range(layers)]
    largest = layers == LARGEST_GEMMA[keys.prefix]
    return {
        "layer_types": ["sliding_attention" if window and each else "full_attention" for each in slides],
        "sliding_window": window or None,
        "query_pre_attn_scalar": sizes["H"] // sizes["heads"] if largest else sizes["D"],
    }


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        PLAIN,
        {**ATTENTION_BIAS, ("ffn_gate", "ffn_up", "ffn_down"): "mlp_bias"},
        mistral,
        interleaved=True,
        divides=True,
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", PLAIN, {QKV: ""}, no_window, free_head=False),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", PLAIN | NORMED, ATTENTION_BIAS, no_window),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", GEMMA, ATTENTION_BIAS, gemma2, less=1.0, divides=True),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", GEMMA | NORMED, ATTENTION_BIAS, gemma3, less=1.0, divides=True
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        FUSED,
        {},
        phi3,
        partial=True,
        free_head=False,
        divides=True,
        scalings=("none", "longrope"),
    ),
}
