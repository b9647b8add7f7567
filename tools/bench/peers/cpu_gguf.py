"""python cpu_gguf.py CHECKPOINT OUT.gguf TYPE: a Llama or Qwen2 in bfloat16 as a GGUF file that llama.cpp quantized.

It runs where llama-cpp-python and gguf are installed. The file has no vocabulary: it is for token ids. A tensor is
what llama.cpp's own converter makes of it: names from the gguf package, vectors in float32, and the rows of a Llama's q
and k in the order of its rotary embedding.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2"}


def write_gguf(checkpoint: Path, out: Path) -> None:
    """All weights as they are, bfloat16."""
    gguf: Any = import_module("gguf")

    config = json.loads((checkpoint / "config.json").read_text())
    kind, layers = config["model_type"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, kind)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[kind]], layers)
    rotated = {"q_proj": heads, "k_proj": kv_heads} if kind == "llama" else {}
    for name, stored in bfloat16_tensors(checkpoint / "model.safetensors"):
        bits = in_pairs(stored, rotated.get(name.split(".")[-2], 0))
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if bits.ndim == 1:
            writer.add_tensor(new, (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(bits).view(np.uint8)
            writer.add_tensor(new, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_pairs(rows: Any, heads: int) -> Any:
    """What is rotated together lies half a head apart, and side by side in llama.cpp."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape) if heads else rows


def bfloat16_tensors(path: Path) -> list[tuple[str, Any]]:
    """The name and the bits, as uint16, of every tensor of a safetensors file."""
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int(data[:8].view(np.uint64)[0])
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    if found := {each["dtype"] for each in header.values()} - {"BF16"}:
        sys.exit(f"{path}: {', '.join(found)}, where all tensors have to be BF16")
    spans = {name: slice(*(start + offset for offset in each["data_offsets"])) for name, each in header.items()}
    return [(name, data[spans[name]].view(np.uint16).reshape(each["shape"])) for name, each in header.items()]


def main(checkpoint: str, out: str, kind: str) -> None:
    llama_cpp: Any = import_module("llama_cpp")

    whole = Path(f"{out}.bf16")
    write_gguf(Path(checkpoint), whole)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    status = llama_cpp.llama_model_quantize(os.fsencode(whole), os.fsencode(out), params)
    whole.unlink()
    sys.exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
