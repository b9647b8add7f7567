"""What a GGUF file's metadata and tensor names say, in transformers' words: its config.json, and where tensors belong.

The keys are llama.cpp's (docs/facts.md, "What GGUF's metadata means"). Every key of the architecture's prefix is
used, harmless with a reason, or refused by name, and so is every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from instantrt.compiler.frontend.architecture import MOST_LAYERS
from instantrt.compiler.frontend.gguf.rope import FREQS, LONG, SAME, SHORT, rotary
from instantrt.compiler.frontend.gguf.values import Keys, Shapes, Sizes, Vectors
from instantrt.passes.core.errors import UserError

HARMLESS_TENSORS = dict.fromkeys((FREQS, LONG, SHORT), "of the rotary table, which the config describes")
HARMLESS_KEYS = {
    "rope.scaling.finetuned": "whether it was trained with the scaling, which changes no number",
    "rope.scaling.original_context_length": "used by the kinds of scaling that have it",
    "tensor_data_layout": "of the weights before the conversion",
}
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27 B, whose scores are scaled by hidden size / heads
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}  # llama.cpp's, of a file that has none


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
    rope = rotary(
        keys,
        sizes,
        tensors,
        vectors,
        model_type=architecture.model_type,
        scalings=architecture.scalings,
        partial=architecture.partial,
    )
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
        what = "InstantRT compiles no GGUF file of this architecture"
        raise UserError(what, where=where, expected=known, found=repr(name[:60]))
    general.expect(general.text("type", "model") == "model", "type", "'model'")
    return ARCHITECTURES[name], Keys(metadata, name, where)


def sizes_of(architecture: Architecture, keys: Keys, tensors: Shapes) -> Sizes:
    """Sizes by the letters of `ModuleOf.shape`.

    V tokens, H the residual's, D of a head, Q of all query heads, K of all key heads, F of the MLP, T = Q + 2 K and
    G = 2 F of fused matrices.
    """
    experts = keys.integer("expert_count", 0, least=0), keys.integer("expert_used_count", 0, least=0)
    if any(experts):
        what = "this is a mixture of experts: InstantRT compiles no such file"
        raise UserError(what, where=keys.where, found=f"{keys.prefix}.expert_count {experts[0]}")
    layers = keys.integer("block_count", most=MOST_LAYERS)
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads, most=heads)
    right = heads % kv_heads == 0
    keys.expect(right, "attention.head_count_kv", f"a divisor of {heads}, the attention.head_count")
    right = hidden % heads == 0 or ("attention.key_length" in keys and not architecture.divides)
    keys.expect(right, "attention.head_count", f"a divisor of {hidden}, the embedding_length")
    head = keys.integer("attention.key_length", hidden // heads)
    right = architecture.free_head or head == hidden // heads
    keys.expect(right, "attention.key_length", f"{hidden // heads}: transformers' model has no other")
    right = keys.integer("attention.value_length", head) == head
    keys.expect(right, "attention.value_length", f"{head}, the key_length")
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
    causal = keys.flag("attention.causal", True)
    keys.expect(causal, "attention.causal", "true: no model of a GGUF file that attends to both sides is compiled")
    pooled = keys.integer("pooling_type", 0, least=0)
    keys.expect(not pooled, "pooling_type", "0: no model of embeddings is compiled of a GGUF file")
    plain = sizes["D"] ** -0.5
    right = math.isclose(keys.number("attention.scale", plain), plain, rel_tol=SAME)
    keys.expect(right, "attention.scale", f"{plain}, 1 / sqrt({sizes['D']})")


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


def no_window(keys: Keys, _: Sizes) -> dict[str, Any]:
    window = keys.integer("attention.sliding_window", 0, least=0)
    keys.expect(not window, "attention.sliding_window", "0: which layers have the window is not said")
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
        keys.expect(len(slides) == layers, key, f"one entry for each of {layers} layers")
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
