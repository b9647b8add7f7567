"""GPTQ checkpoints, bit for bit: codes, scales and zero points are taken as they are, never dequantized.

qweight  int32 [K * bits / 32, N]   codes of consecutive k, lowest bits first
qzeros   int32 [G, N * bits / 32]   zero points of consecutive n; format `gptq` stores the packed words less 1 a field
scales   fp16  [G, N]
g_idx    int32 [K]                  the group of each k
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler.checkpoint import read_json
from compiler.quant.config import QuantConfig
from passes.errors import UserError
from passes.insert_qdq import Decisions
from passes.lazy import Array, FileTensor, Tile
from passes.linear import Linear
from passes.quant import Codes, QuantTensor
from passes.rewrite import Reject

TILE_CODES = 1 << 22
FORMATS = {"gptq": 1, "gptq_v2": 0}  # what has to be added to a stored zero


@dataclass(frozen=True)
class GptqConfig:
    """What a checkpoint says of itself."""

    bits: int
    group_size: int
    symmetric: bool
    zero_offset: int


def find_config(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization config of a checkpoint: in config.json, or in quantize_config.json beside it."""
    inside = config.get("quantization_config")
    if isinstance(inside, dict):
        return inside
    beside = folder / "quantize_config.json"
    return read_json(beside) if beside.is_file() else None


def parse_config(raw: Mapping[str, Any], where: str) -> GptqConfig:
    bits, group_size = raw.get("bits"), raw.get("group_size", -1)
    if bits not in (4, 8):
        raise UserError("GPTQ bits", where=where, expected="4 or 8", found=repr(bits))
    if not isinstance(group_size, int) or group_size == 0 or group_size < -1:
        raise UserError("GPTQ group_size", where=where, expected="-1 or a positive integer", found=repr(group_size))
    if raw.get("desc_act"):
        raise UserError(
            "desc_act=true (activation order) is not supported",
            where=where,
            fix="quantize again with desc_act=false",
        )
    name = raw.get("checkpoint_format", raw.get("format", "gptq"))
    if name not in FORMATS:
        raise UserError("GPTQ checkpoint_format", where=where, expected=" or ".join(FORMATS), found=repr(name))
    return GptqConfig(bits, group_size, bool(raw.get("sym", True)), FORMATS[name])


def decide(
    linears: Iterable[Linear],
    tensors: Mapping[str, FileTensor],
    gptq: GptqConfig,
    config: QuantConfig,
    head: str | None,
) -> Decisions:
    """Path -> the checkpoint's own quantization of it, or why it stays float."""
    decisions: dict[str, QuantTensor | Reject] = {}
    for found in linears:
        if f"{found.path}.qweight" in tensors:
            decisions[found.path] = quantized(found, tensors, gptq, "int8" if config.activate_quant else "float")
        elif found.path == head:
            decisions[found.path] = Reject("the checkpoint leaves the head float")
        else:
            decisions[found.path] = Reject("the checkpoint leaves this layer float")
    return decisions


def quantized(found: Linear, tensors: Mapping[str, FileTensor], gptq: GptqConfig, activations: Any) -> QuantTensor:
    (n, k), bits, path = found.shape, gptq.bits, found.path
    group = k if gptq.group_size == -1 else gptq.group_size
    if k % group:
        raise UserError(
            "group_size does not divide the layer's input width",
            where=path,
            expected=f"a divisor of {k}",
            found=str(group),
        )
    groups = k // group
    part = {
        "qweight": ([k * bits // 32, n], np.int32),
        "qzeros": ([groups, n * bits // 32], np.int32),
        "scales": ([groups, n], np.float16),
    }
    for name, (shape, dtype) in part.items():
        tensor = tensors.get(f"{path}.{name}")
        if tensor is None:
            raise UserError(f"the checkpoint has no {name} for this layer", where=path)
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            raise UserError(
                f"{name} disagrees with the checkpoint's config (bits {bits}, group_size {gptq.group_size})",
                where=path,
                expected=f"{shape} {np.dtype(dtype)}",
                found=f"{list(tensor.shape)} {tensor.dtype}",
            )
    source = GptqRows(
        path,
        tensors[f"{path}.qweight"],
        tensors[f"{path}.qzeros"],
        tensors[f"{path}.scales"],
        tensors.get(f"{path}.g_idx"),
        gptq,
        group,
    )
    return QuantTensor(path, source, (n, k), bits, group, gptq.symmetric, np.dtype(np.float16), activations)


@dataclass(frozen=True)
class GptqRows:
    """Unpacks a GPTQ layer into `Codes`, a strip of output channels at a time."""

    path: str
    qweight: FileTensor
    qzeros: FileTensor
    scales: FileTensor
    g_idx: FileTensor | None
    config: GptqConfig
    group_size: int

    def tiles(self) -> Iterator[Tile]:
        bits = self.config.bits
        n = self.qweight.shape[1]
        k = self.qweight.shape[0] * 32 // bits
        self.check_order(k)
        scale, zero = self.checked_scales(), self.checked_zeros(n)
        step = max(64, TILE_CODES // k)
        for start in range(0, n, step):
            stop = min(start + step, n)
            words = self.qweight.columns(start, stop)
            codes = unpack(words, bits).reshape(k, stop - start).T
            yield Tile(start, Codes(np.ascontiguousarray(codes), scale[start:stop], zero[start:stop]))

    def check_order(self, k: int) -> None:
        if self.g_idx is None:
            return
        groups = whole(self.g_idx)
        if groups.shape != (k,) or (groups != np.arange(k) // self.group_size).any():
            raise UserError(
                "g_idx puts the inputs in another order than the config says (desc_act=false)",
                where=f"{self.path}.g_idx",
                expected="k // group_size",
                fix="activation order is not supported: quantize again with desc_act=false",
            )

    def checked_scales(self) -> Array:
        scale = whole(self.scales).astype(np.float32)
        bad = np.argwhere(~(np.isfinite(scale) & (scale > 0)))
        if len(bad):
            group, channel = bad[0]
            raise UserError(
                "a scale is not a positive finite number",
                where=f"{self.path}.scales[{group}, {channel}]",
                found=str(scale[group, channel]),
            )
        return np.ascontiguousarray(scale.T)

    def checked_zeros(self, n: int) -> Array:
        bits = self.config.bits
        ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
        words = whole(self.qzeros).view(np.uint32)
        # The offset was taken off the packed word, borrows included, so it goes back onto the packed word.
        zero = unpack((words + ones * np.uint32(self.config.zero_offset)).T, bits).reshape(n, -1)
        central = 1 << (bits - 1)
        if self.config.symmetric and (zero != central).any():
            raise UserError(
                "the config says sym=true, but zero points differ from the centre",
                where=f"{self.path}.qzeros",
                expected=str(central),
                found=str(sorted(set(zero[zero != central].tolist()))[:5]),
                fix="the checkpoint_format may be the other one of gptq and gptq_v2, or sym may be false",
            )
        return zero


def unpack(words: Array, bits: int) -> Array:
    """int32 [R, C] -> uint8 [R, 32 / bits, C]; fields from the lowest bits up."""
    w = words.view(np.uint32)
    fields = [((w >> np.uint32(shift)) & np.uint32((1 << bits) - 1)).astype(np.uint8) for shift in range(0, 32, bits)]
    return np.stack(fields, axis=1)


def whole(tensor: FileTensor) -> Array:
    """A small tensor, read at once."""
    return np.concatenate([tile.parts[0] for tile in tensor.tiles()])
