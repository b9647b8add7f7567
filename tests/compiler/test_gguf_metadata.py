"""What GGUF metadata say: tiny models, written as llama.cpp's converter writes them, are the same models again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from instantrt.compiler.frontend.gguf.architectures import config_of, places_of
from instantrt.compiler.frontend.gguf.file import open_gguf
from instantrt.compiler.frontend.gguf.folder import made_folder
from instantrt.compiler.frontend.gguf.tokenizer import CONTROL, DEFINED, tokenizer_files
from instantrt.compiler.inspect import inspect
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import whole

LAYERS, HIDDEN, HEADS, TOKENS, CONTEXT = 3, 32, 4, 40, 64
BASE = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 64,
    "vocab_size": TOKENS,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_theta": 5000.0},
}
KEYS = {
    "block_count": LAYERS,
    "context_length": CONTEXT,
    "embedding_length": HIDDEN,
    "feed_forward_length": 64,
    "attention.head_count": HEADS,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5000.0,
}
LONG = {"rope_type": "longrope", "rope_theta": 5000.0, "factor": 2.0, "partial_rotary_factor": 0.5}
LONG |= {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0, "original_max_position_embeddings": 16}
WINDOWS = {"sliding_window": 4, "query_pre_attn_scalar": 16, "head_dim": 16, "tie_word_embeddings": True}
WINDOW_KEYS = {"attention.sliding_window": 4, "attention.key_length": 16, "attention.value_length": 16}
# Name of the test -> (llama.cpp's architecture, transformers' model_type, its config, the keys that say so, tensors).
MODELS: Mapping[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, list[float]]]] = {
    "llama": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, {"rope.dimension_count": 8}, {}),
    "mistral": ("llama", "mistral", {"sliding_window": 4, "head_dim": 16}, {**WINDOW_KEYS}, {}),
    "yarn": (
        "llama",
        "llama",
        {"rope_parameters": YARN, "tie_word_embeddings": True},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
        {},
    ),
    "qwen2": ("qwen2", "qwen2", {}, {}, {}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 16}, {"attention.key_length": 16, "attention.value_length": 16}, {}),
    "gemma2": (
        "gemma2",
        "gemma2",
        {**WINDOWS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
        {**WINDOW_KEYS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
        {},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {
            **WINDOWS,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {
            **WINDOW_KEYS,
            "attention.sliding_window_pattern": 2,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        {},
    ),
    "phi3": (
        "phi3",
        "phi3",
        {"rope_parameters": {**LONG, "attention_factor": 1.25}, "original_max_position_embeddings": 32},
        {
            "rope.dimension_count": 4,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": 1.25,
            "attention.sliding_window": 0,
        },
        {"rope_factors_long.weight": [2.0, 3.0], "rope_factors_short.weight": [1.0, 1.5]},
    ),
}


def written(path: Path, name: str) -> Any:
    """A random model, and its file as llama.cpp's converter writes it."""
    architecture, kind, own, keys, factors = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**BASE, **own}), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    names = get_tensor_name_map(arch, LAYERS)
    writer = GGUFWriter(path, architecture)
    writer.add_float32("maker.scale", 1.5)
    for key, value in {**KEYS, **keys}.items():
        add: Callable[..., None] = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[
            type(value)
        ]
        add(f"{architecture}.{key}", value)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        if architecture == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = HEADS if "q_proj" in key else 2
            data = data.reshape(heads, 2, len(data) // heads // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if architecture.startswith("gemma") and key.endswith("norm.weight"):
            data = data + 1
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), np.ascontiguousarray(data))
    for key, numbers in factors.items():
        writer.add_tensor(key, np.array(numbers, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_same_again(tmp_path: Path, name: str) -> None:
    model = written(tmp_path / "m.gguf", name)
    made = made_folder(tmp_path / "m.gguf", cache=tmp_path)
    again = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(made.path), attn_implementation="eager").eval()
    state = {key: torch.from_numpy(np.array(whole(tensor))) for key, tensor in made.weights.items()}
    again.load_state_dict(state)
    assert type(again) is type(model)
    for length in (12, 40):  # beyond the windows; and beyond the lengths of the short factors
        ids = torch.arange(length)[None] % TOKENS
        with torch.no_grad():
            expected, found = model(ids).logits, again(ids).logits
        assert float((expected - found).abs().max()) <= 2e-6 * float(expected.abs().max())


def test_inspect_tells_the_types_and_the_bytes(tmp_path: Path) -> None:
    written(tmp_path / "m.gguf", "gemma2")
    found = inspect(tmp_path / "m.gguf", cache=tmp_path)
    tensors = open_gguf(tmp_path / "m.gguf").tensors
    assert found.bytes == sum(4 * int(np.prod(tensor.shape)) for tensor in tensors.values())
    assert found.notes[0] == f"types of tensors: {len(tensors)} F32"
    assert found.notes[1] == "metadata beside those of the format, not read: maker.scale"
    assert not found.problems


def said(tmp_path: Path, name: str = "llama") -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    written(tmp_path / "m.gguf", name)
    file = open_gguf(tmp_path / "m.gguf")
    return dict(file.metadata), {key: tensor.shape for key, tensor in file.tensors.items()}


def read(metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]], numbers: Any = None) -> dict[str, Any]:
    places_of(metadata, tensors, "m.gguf")
    return config_of(metadata, tensors, lambda name: numbers, "m.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 10**12),
        ("block_count", 0),
        ("block_count", [3]),
        ("block_count", True),
        ("embedding_length", -1),
        ("embedding_length", 64),
        ("attention.head_count", 3),
        ("attention.head_count_kv", 3),
        ("attention.key_length", 2**40),
        ("attention.value_length", 4),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("attention.layer_norm_rms_epsilon", None),
        ("attention.scale", 0.5),
        ("attention.causal", False),
        ("feed_forward_length", "64"),
        ("context_length", 1.5),
        ("expert_count", 8),
        ("pooling_type", 3),
        ("vocab_size", 41),
        ("rope.dimension_count", 4),
        ("rope.freq_base", 0.0),
        ("rope.scaling.type", "dynamic"),
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.attn_factor", 2.0),
        ("logit_scale", 2.0),
    ],
)
def test_metadata_that_cannot_be_are_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    metadata, tensors = said(tmp_path)
    assert read(metadata, tensors)["hidden_size"] == HIDDEN
    metadata[f"llama.{key}"] = value
    with pytest.raises(UserError, match=r"m\.gguf.*(llama\.|tensor|token_embd|experts|the scaling)"):
        read(metadata, tensors)


@pytest.mark.parametrize(
    ("metadata", "tensors", "names"),
    [
        ({"general.architecture": "mamba"}, {}, "llama, qwen2, qwen3, gemma2, gemma3, phi3"),
        ({"general.architecture": 3}, {}, "general.architecture"),
        ({"general.type": "adapter"}, {}, "general.type"),
        ({"tokenizer.ggml.tokens": ["a"]}, {}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.eos_token_id": TOKENS}, {}, "eos_token_id"),
        ({}, {"blk.1.ffn_up.weight": None}, "no tensor blk.1.ffn_up.weight"),
        ({}, {"blk.1.ffn_up.weight": (32, 64)}, "shape of blk.1.ffn_up.weight"),
        ({}, {"blk.0.attn_q.bias": None}, "no tensor blk.0.attn_q.bias"),
        ({}, {"blk.3.ffn_up.weight": (64, 32)}, "blk.3.ffn_up.weight: nothing is known"),
        ({}, {"token_embd.weight": None}, "token_embd"),
        ({}, {"rope_freqs.weight": (3,)}, "rope_freqs"),
    ],
)
def test_tensors_and_other_keys_that_cannot_be(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any], names: str
) -> None:
    keys, shapes = said(tmp_path)
    shapes = {name: shape for name, shape in (shapes | tensors).items() if shape is not None}
    with pytest.raises(UserError, match=names):
        read(keys | metadata, shapes)


def test_llama3s_factors_are_told_from_others(tmp_path: Path) -> None:
    """Those of Llama 3.1 by name, any others as a list; the frequencies are the ones that the factors divide."""
    metadata, _ = said(tmp_path, "yarn")
    metadata = {k: v for k, v in metadata.items() if ".rope." not in k}
    metadata |= {"llama.embedding_length": 256, "llama.rope.freq_base": 500000.0}
    shapes = {"token_embd.weight": (TOKENS, 256), "rope_freqs.weight": (32,)}
    plain = 1.0 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    for factor in (8.0, 32.0):
        known = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        known |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0, "rope_type": "llama3"}
        config = AutoConfig.for_model("llama", hidden_size=256, num_attention_heads=4, rope_parameters=known)
        llama3 = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
        for numbers, kind in ((plain / llama3, "llama3"), (np.linspace(1, 3, 32), "longrope")):
            found = config_of(metadata, shapes, lambda name, n=numbers: n, "m.gguf")["rope_parameters"]
            assert found["rope_type"] == kind
            again = AutoConfig.for_model("llama", hidden_size=256, num_attention_heads=4, rope_parameters=found)
            frequencies, scale = ROPE_INIT_FUNCTIONS[kind](again, "cpu")
            np.testing.assert_allclose(frequencies.numpy(), plain / numbers, rtol=2e-6)
            assert scale == 1


def test_tokens_that_are_no_letters_of_bytes_are_found_whole() -> None:
    """DeepSeek's, and spaces: a prompt of a chat would else be another one."""
    letters = [*sorted(ByteLevel.alphabet()), "aa", "ĠĠ"]
    whole = {"<\uff5cUser\uff5c>": CONTROL, "  ": DEFINED, "<t>": DEFINED}
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*letters, *whole],
        "tokenizer.ggml.token_type": [1] * len(letters) + [*whole.values()],
        "tokenizer.ggml.merges": ["a a", "Ġ Ġ"],
    }
    files, notes = tokenizer_files({"general.architecture": "qwen2", **metadata}, "model.gguf")
    found = Tokenizer.from_str(files["tokenizer.json"])
    assert found.get_vocab_size() == len(letters) + len(whole)
    assert found.encode("<\uff5cUser\uff5c>aa  <t>b").tokens == ["<\uff5cUser\uff5c>", "aa", "  ", "<t>", "b"]
    assert found.decode(list(range(len(letters) - 1, len(letters) + 3))) == "    <t>"
    assert notes == []
