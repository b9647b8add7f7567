"""GGUF files for the tests: blocks of every type at random, and small models of them, written by the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from instantrt.passes.core.lazy import Array

# Where the float16 numbers of a block are: its scale, then its minimum.
HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
}
FACTOR = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 64, "Q4_K": 32, "Q5_K": 32, "IQ4_XS": 16}  # what integers scale it by, about
STEPS = {"Q8_0": 127, "IQ4_NL": 127, "IQ4_XS": 127, "Q6_K": 32, "Q5_0": 16, "Q5_1": 31, "Q5_K": 31, "Q2_K": 3}
SIZES = {"vocab": 288, "hidden": 256, "mlp": 512, "heads": 4, "kv_heads": 2, "layers": 2}
KINDS_OF_LAYERS = (
    {"attn_q": "Q4_K", "attn_k": "Q5_0", "attn_v": "Q8_0", "attn_output": "Q4_0"}
    | {"ffn_gate": "Q4_1", "ffn_up": "Q5_K", "ffn_down": "Q3_K"},
    {"attn_q": "IQ4_NL", "attn_k": "Q2_K", "attn_v": "Q5_1", "attn_output": "IQ4_XS"}
    | {"ffn_gate": "Q6_K", "ffn_up": "Q8_0", "ffn_down": "F16"},
)


def blocks(kind: str, shape: tuple[int, int], rng: np.random.Generator, *, size: float = 0.05) -> Array:
    """Rows of blocks, uint8 [N, bytes], whose weights are about `size`; one scale is 0, and some below it where the
    type may have such."""
    weights, width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    n, k = shape
    raw = rng.integers(0, 256, (n, k // weights, width), dtype=np.uint8)
    for i, at in enumerate(HALVES.get(kind, (0,))):
        numbers = rng.normal(0, size / STEPS.get(kind, 8) / FACTOR.get(kind, 1), (n, k // weights)).astype(np.float16)
        if len(HALVES.get(kind, ())) > 1 and i == 0:
            numbers = np.abs(numbers)
        if kind == "Q8_0":
            raw[..., 2:] |= 1  # the lowest code has no opposite
        numbers[0, 0] = 0 if i == 0 else numbers[0, 0]
        raw[..., at : at + 2] = numbers[..., None].view(np.uint8)
    return raw.reshape(n, -1)


def llama(
    path: Path,
    *,
    kinds: tuple[Mapping[str, str], ...] = KINDS_OF_LAYERS,
    table: str = "Q6_K",
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Mapping[str, Array]:
    """Writes a Llama with tied embeddings; gives its weights in float32 as transformers names and orders them."""
    rng, s = np.random.default_rng(0), SIZES
    writer = gguf.GGUFWriter(path, "llama", endianess=endianess)
    head = s["hidden"] // s["heads"]
    for add, value in (
        (writer.add_block_count, s["layers"]),
        (writer.add_context_length, 128),
        (writer.add_embedding_length, s["hidden"]),
        (writer.add_feed_forward_length, s["mlp"]),
        (writer.add_head_count, s["heads"]),
        (writer.add_head_count_kv, s["kv_heads"]),
        (writer.add_rope_dimension_count, head),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, s["vocab"]),
    ):
        add(value)
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj"} | {f"ffn_{p}": f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    kv = head * s["kv_heads"]
    shapes = {"attn_q": (256, 256), "attn_k": (kv, 256), "attn_v": (kv, 256), "attn_output": (256, 256)}
    shapes |= {"ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}
    floats: dict[str, Array] = {}

    def write(name: str, new: str, shape: tuple[int, int], kind: str, heads: int = 0, size: float = 0.05) -> None:
        if kind == "F16":
            raw = rng.normal(0, size, shape).astype(np.float16)
            writer.add_tensor(name, raw)
            values = raw.astype(np.float32)
        else:
            raw = blocks(kind, shape, rng, size=size)
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[kind])
            values = gguf.dequantize(raw, GGMLQuantizationType[kind])
        if heads:  # the file has them row by row in turn
            values = values.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        floats[new] = values

    write("token_embd.weight", "model.embed_tokens.weight", (s["vocab"], 256), table, size=0.5)
    for i, of_layer in enumerate(kinds):
        for part, kind in of_layer.items():
            heads = {"attn_q": s["heads"], "attn_k": s["kv_heads"]}.get(part, 0)
            write(f"blk.{i}.{part}.weight", f"model.layers.{i}.{names[part]}.weight", shapes[part], kind, heads)
        for old, new in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            norm = rng.uniform(0.5, 1.5, 256).astype(np.float32)
            writer.add_tensor(f"blk.{i}.{old}.weight", norm)
            floats[f"model.layers.{i}.{new}.weight"] = norm
    norm = rng.uniform(0.5, 1.5, 256).astype(np.float32)
    writer.add_tensor("output_norm.weight", norm)
    floats["model.norm.weight"] = norm
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return floats
