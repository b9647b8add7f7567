"""Checkpoints of random weights in a known model's shape, for benchmarks."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from instantrt.passes.core.lazy import Array
from instantrt.tools.places import EXAMPLE

QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
}
TIED = {**QWEN2, "tie_word_embeddings": True}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def sized(config: Mapping[str, Any], *sizes: int) -> dict[str, Any]:
    """A config with such SIZES."""
    return {**config, **dict(zip(SIZES, sizes, strict=True))}


QWEN2_7B = sized(QWEN2, 3584, 18944, 28, 28, 4, 152064)
QWEN2_05B = sized(QWEN2, 896, 4864, 24, 14, 2, 152064)
QWEN2_15B = sized(TIED, 1536, 8960, 28, 12, 2, 151936)
DECODER_12 = sized(QWEN2, 2048, 8192, 12, 16, 8, 32000)
SMOLLM2_135M = sized({**TIED, **LLAMA}, 576, 1536, 30, 9, 3, 49152)
CHUNK = 1 << 23  # weights made at a time


def write_checkpoint(folder: Path, config: Mapping[str, Any], *, tokenizer: bool = False) -> int:
    """config.json and model.safetensors, bfloat16; returns the bytes of weights. `tokenizer`: with the example's, as
    peers convert no model without one.

    Norms are 1; everything else is normal with a deviation of 0.02, of 65,536 values. No two tensors are equal.
    """
    from instantrt.compiler.frontend.skeleton import build_skeleton

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        shutil.copyfile(EXAMPLE / name, folder / name)
    shapes = {name: tuple(p.shape) for name, p in build_skeleton(config, folder, False).named_parameters()}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    normal = (random.standard_normal(1 << 16, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for start in range(0, math.prod(shape), CHUNK):
                count = min(CHUNK, math.prod(shape) - start)
                drawn = normal[np.frombuffer(random.bytes(2 * count), np.uint16)]
                file.write((np.ones_like(drawn) if "norm" in name else drawn).tobytes())
    return offset


def write_safetensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Arrays of any strides: the library writes the memory of those that it takes for contiguous."""
    save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, path)
