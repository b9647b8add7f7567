"""Causal LMs of several families, tiny and random, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "llama": {"tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": 4},
    "phi3": {"sliding_window": 5},
    "phi3-partial": {"model_type": "phi3", "partial_rotary_factor": 0.5},
    "gpt_neox": {"num_key_value_heads": 4, "tie_word_embeddings": False},  # files call its head embed_out
    "gemma2": {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16},
}

LAYERS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
}
# As many layers as show that some are exported for all: two of a kind, and another that comes again. One family has
# a layer more, which comes after one that was repeated.
DEEP: dict[str, dict[str, Any]] = {
    family: {
        **SIZES,
        "model_type": family,
        **fields,
        **(LAYERS if family.startswith("gemma") else {"num_hidden_layers": 4 if family == "llama" else 3}),
    }
    for family, fields in FAMILIES.items()
}


def make(family: str, folder: Path, **fields: Any) -> Any:
    """A model with weights large enough that every part of it matters, saved in several shards."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    fields = {"model_type": family, **SIZES, **FAMILIES.get(family, {}), **fields}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0, 0.15)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model
