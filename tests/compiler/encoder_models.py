"""Encoders of several families, tiny and random, as transformers and sentence-transformers save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.utils import logging

from instantrt import Request, compile_model

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 120,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "id2label": {0: "bad", 1: "fair", 2: "good"},
}
LONGEST = 20  # tokens of a text, in the models below that read some
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"type_vocab_size": 2},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "modernbert": {"global_attn_every_n_layers": 3, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 2},
    "mpnet": {},
    "electra": {"embedding_size": 16, "type_vocab_size": 2},
    "albert": {"embedding_size": 16},
    "convbert": {"embedding_size": 32, "type_vocab_size": 2, "conv_kernel_size": 3},
    "deberta-v2": {
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "use_bidirectional_attention": True, "sliding_window": 8},
}


def make(family: str, auto: str, folder: Path, **fields: Any) -> Any:
    """A model with weights large enough that every part of it matters."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    said = {**SIZES, **FAMILIES.get(family, {}), **fields}
    config = AutoConfig.for_model(said.pop("model_type", family), **said)
    model = getattr(transformers, auto).from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.3) if parameter.ndim == 1 else torch.nn.init.normal_(parameter, 0, 0.15)
    model.save_pretrained(folder)
    return model


def sentence(folder: Path, *modules: tuple[str, dict[str, Any], dict[str, torch.Tensor]], **prompts: Any) -> None:
    """Makes the model in `folder` a sentence-transformers one, with `(kind, config, weights)` behind it."""
    from safetensors.torch import save_file

    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, (kind, config, weights) in enumerate(modules, 1):
        path = f"{index}_{kind}"
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(config))
        if weights:
            save_file(weights, folder / path / "model.safetensors")
        own = "my.models" if kind == "mine" else "sentence_transformers.models"
        listed.append({"idx": index, "name": str(index), "path": path, "type": f"{own}.{kind}"})
    (folder / "modules.json").write_text(json.dumps(listed))
    if prompts:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))


def tokenizer(folder: Path) -> None:
    """A tokenizer of letters, which begins with one token and ends with another, and cuts as a training had it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = {chr(c): c - 20 for c in range(32, 127)}
    made = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "?": 3, **letters}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> $B:1 </s>:1", [("<s>", 0), ("</s>", 2)]
    )
    made.enable_truncation(5)
    made.enable_padding(length=5, pad_id=1, pad_token="<pad>")
    made.save(str(folder / "tokenizer.json"))


def embedding_model(folder: Path) -> None:
    """A sentence-transformers folder, and what is compiled of it in `out`."""
    make("bert", "AutoModel", folder / "letters")
    tokenizer(folder / "letters")
    pooling = ("Pooling", {"word_embedding_dimension": 32}, {})
    sentence(folder / "letters", pooling, prompts={"query": "find "}, default_prompt_name=None)
    settings = {"max_seq_length": LONGEST, "do_lower_case": True}
    (folder / "letters/sentence_bert_config.json").write_text(json.dumps(settings))
    compile_model(Request(folder / "letters", ("x86",), folder / "out", quant="a16w8"))


def classifier(folder: Path) -> None:
    """A model of three labels, and what is compiled of it in `out`."""
    make("roberta", "AutoModelForSequenceClassification", folder / "moods")
    tokenizer(folder / "moods")
    compile_model(Request(folder / "moods", ("x86",), folder / "out"))
