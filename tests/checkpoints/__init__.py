"""The checkpoints of the real libraries, made whole again, and small ones of our own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.quant.readers import announced_reader
from instantrt.compiler.quant.stored import StoredLayer
from instantrt.passes.core.lazy import Array, whole
from instantrt.passes.core.quant import Codes, QuantTensor, dequantize
from instantrt.tools.bench.synthetic import write_safetensors

HERE = Path(__file__).parent
TINY = HERE.parent.parent / "examples" / "tiny-qwen2"
NAMES = tuple(sorted(p.name for p in HERE.iterdir() if (p / "config.json").is_file()))
Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SHAPES = {Q_PROJ: (256, 256), DOWN_PROJ: (256, 768)}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def read_layer(folder: Path, path: str, shape: tuple[int, int]) -> QuantTensor:
    """One layer of a quantized checkpoint, as its reader has it."""
    tensors = read_checkpoint(folder)
    reader = announced_reader(folder, config_of(folder))
    assert reader is not None
    quant = reader.read(StoredLayer(path, shape, tensors))
    assert isinstance(quant, QuantTensor), quant
    return quant


def decoded(quant: QuantTensor) -> Codes:
    """The whole weight: codes [N, K], scale and zero [N, G]."""
    return Codes(*(np.concatenate(parts) for parts in zip(*(t.parts for t in quant.tiles()), strict=True)))


def weight(quant: QuantTensor) -> Array:
    """W [N, K] in float32, inputs in the model's own order."""
    w = dequantize(decoded(quant), quant.group_size)
    if quant.order is not None:
        w = w[:, np.argsort(quant.order.indices)]
    return w


def pack(fields: Array, bits: int) -> Array:
    """Fields [R, C] -> int32 [ceil(R * bits / 32), C], the first field in the lowest bits."""
    per = 32 // bits
    padded = np.pad(fields.astype(np.uint64), ((0, -len(fields) % per), (0, 0)))
    shifts = np.arange(per, dtype=np.uint64)[None, :, None] * np.uint64(bits)
    return (padded.reshape(-1, per, fields.shape[1]) << shifts).sum(axis=1).astype(np.uint32).view(np.int32)


def gptq_tensors(
    path: str, codes: Array, zero: Array, scale: Array, bits: int, g_idx: Array | None = None, *, v2: bool = False
) -> dict[str, Array]:
    """codes [K, N], zero and scale [G, N] -> the tensors as GPTQModel writes them.

    Its `gptq` format takes 1 off every field with one subtraction a word, so that a zero of 0 borrows.
    """
    words = pack(zero.T, bits).view(np.uint32).T
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    stored_zero = words if v2 else words - ones
    tensors = {"qweight": pack(codes, bits), "qzeros": np.ascontiguousarray(stored_zero).view(np.int32)}
    tensors["scales"] = scale.astype(np.float16)
    if g_idx is not None:
        tensors["g_idx"] = g_idx.astype(np.int32)
    return {f"{path}.{name}": array for name, array in tensors.items()}


def digest(matrix: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(matrix, np.float32).tobytes()).hexdigest()


def whole_checkpoint(
    name: str, out: Path, change: Callable[[dict[str, Any], dict[str, Array]], None] = lambda config, tensors: None
) -> Path:
    """A one-layer model in `out`: the checkpoint's layer, the example model's embeddings and norms; then `change`d."""
    tensors = {n: whole(t) for n, t in read_checkpoint(TINY).items() if ".layers." not in n or ".layers.0." in n}
    stored = {n: whole(t) for n, t in read_checkpoint(HERE / name).items()}
    quantized = {n.rpartition(".")[0] for n in stored if n.endswith(("qweight", "weight_packed", "weight_scale"))}
    kept = {n: a for n, a in tensors.items() if n.rpartition(".")[0] not in quantized or n.endswith(".bias")}
    config = config_of(HERE / name)
    merged = kept | stored
    change(config, merged)
    return write_checkpoint(out, config, merged)


def write_checkpoint(out: Path, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config))
    write_safetensors(out / "model.safetensors", tensors)
    return out
