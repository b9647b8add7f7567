"""GPTQ checkpoints, bit for bit: codes, scales and zero points are taken as they are, never dequantized.

qweight  int32 [ceil(K * bits / 32), N]      codes of consecutive k, lowest bits first
qzeros   int32 [G, ceil(N * bits / 32)]      zero points of consecutive n; `gptq` stores the packed words less 1 a field
scales   fp16  [G, N]
g_idx    int32 [K]                           the group of each k
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from instantrt.compiler.quant.stored import (
    FLOATS,
    INT32,
    Layer,
    checked_scales,
    input_order,
    safe_pattern,
    strips,
    unpack,
    words_for,
)
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array, FileTensor, Tile, whole
from instantrt.passes.core.quant import Activations, Codes, Order, QuantTensor
from instantrt.passes.core.rewrite import Reject

FORMATS = {"gptq": 1, "gptq_v2": 0}  # what has to be added to a stored zero
OVERRIDES = ("bits", "group_size", "sym", "desc_act")


@dataclass(frozen=True)
class GptqConfig:
    """What a checkpoint says of itself. `dynamic` holds (pattern, overrides); None for a module that is left float."""

    bits: int
    group_size: int
    symmetric: bool
    zero_offset: int
    reordered: bool = False
    dynamic: tuple[tuple[re.Pattern[str], Mapping[str, Any] | None], ...] = ()
    where: str = ""

    method = "gptq"
    mark = "qweight"
    notes: ClassVar[tuple[str, ...]] = ()

    @property
    def activations(self) -> Activations:
        """Eight-bit checkpoints run as A8W8 unless asked otherwise, as in DashInfer."""
        return "int8" if self.bits == 8 else "float"

    def module(self, path: str) -> GptqConfig | None:
        """The config of one module: the first matching pattern of `dynamic` changes it, or leaves it float."""
        for pattern, changes in self.dynamic:
            if pattern.match(path):
                return None if changes is None else parse_layer(changes, self, f"{self.where}, dynamic")
        return self

    def read(self, layer: Layer) -> QuantTensor | Reject:
        stored = layer.find("qweight") is not None
        config = self.module(layer.path)
        if stored and config is None:
            raise UserError("the config leaves this module float, the checkpoint holds it quantized", where=layer.path)
        if not stored or config is None:
            return Reject("the checkpoint leaves this layer float")
        (n, k), bits = layer.shape, config.bits
        group = layer.group(config.group_size)
        groups = k // group
        qweight = layer.part("qweight", (words_for(k, bits), n), INT32)
        qzeros = layer.part("qzeros", (groups, words_for(n, bits)), INT32)
        scales = layer.part("scales", (groups, n), *FLOATS)
        order, places = config.order(layer, group)
        rows = GptqRows(
            layer.path, (n, k), qweight, qzeros, scales, config.zero_offset, bits, config.symmetric, order, places
        )
        return QuantTensor(
            layer.path, rows, (n, k), bits, group, config.symmetric, scales.dtype, config.activations, order
        )

    def order(self, layer: Layer, group: int) -> tuple[Order | None, tuple[int, ...]]:
        k = layer.shape[1]
        if layer.find("g_idx") is None:
            if self.reordered and group != k:
                raise UserError("desc_act=true, but the checkpoint has no g_idx for this layer", where=layer.path)
            return None, tuple(range(k // group))
        g_idx = layer.part("g_idx", (k,), INT32)
        order, places = input_order(g_idx, group)
        if not self.reordered and (order is not None or (places != np.arange(len(places))).any()):
            raise UserError(
                "g_idx puts the inputs in another order than the config says (desc_act=false)",
                where=g_idx.name,
                expected="k // group_size",
                fix="desc_act must be true in the config, or the checkpoint is damaged: libraries disagree here",
            )
        return order, tuple(int(p) for p in places)


def parse(raw: Mapping[str, Any], where: str) -> GptqConfig:
    """A reader from `quantization_config` or quantize_config.json."""
    name = raw.get("checkpoint_format", raw.get("format", "gptq"))
    if name not in tuple(FORMATS):
        raise UserError(
            "GPTQ checkpoint_format",
            where=where,
            expected=" or ".join(FORMATS),
            found=repr(name),
            fix="save the checkpoint again in one of these formats; kernel-specific layouts lose what they do not need",
        )
    if raw.get("pack_dtype", "int32") != "int32":
        raise UserError("GPTQ pack_dtype", where=where, expected="int32", found=repr(raw["pack_dtype"]))
    base = parse_layer(raw, GptqConfig(0, -1, True, FORMATS[name], where=where), where)
    dynamic = raw.get("dynamic") or {}
    if not isinstance(dynamic, dict) or len(dynamic) > 10_000:
        raise UserError("GPTQ dynamic", where=where, expected="an object of pattern to overrides", found=repr(dynamic))
    rules = tuple(override(pattern, changes, f"{where}, dynamic {pattern!r}") for pattern, changes in dynamic.items())
    for _, changes in rules:
        parse_layer(changes or {}, base, f"{where}, dynamic")
    return replace(base, dynamic=rules)


def parse_layer(raw: Mapping[str, Any], base: GptqConfig, where: str) -> GptqConfig:
    """`base` with what `raw` says otherwise, checked."""
    bits, group_size = raw.get("bits", base.bits), raw.get("group_size", base.group_size)
    if type(bits) is not int or bits not in (4, 8):
        raise UserError(
            "GPTQ bits",
            where=where,
            expected="4 or 8",
            found=repr(bits),
            fix="2 and 3 bits have no kernels here: quantize to 4 bits" if bits in (2, 3) else "",
        )
    if type(group_size) is not int or group_size == 0 or group_size < -1:
        raise UserError("GPTQ group_size", where=where, expected="-1 or a positive integer", found=repr(group_size))
    for key in ("sym", "desc_act"):
        if not isinstance(raw.get(key), bool | None):
            raise UserError(f"GPTQ {key}", where=where, expected="true or false", found=repr(raw[key]))
    symmetric, reordered = raw.get("sym"), raw.get("desc_act")
    return replace(
        base,
        bits=bits,
        group_size=group_size,
        symmetric=base.symmetric if symmetric is None else symmetric,
        reordered=base.reordered if reordered is None else reordered,
    )


def override(pattern: str, changes: Any, where: str) -> tuple[re.Pattern[str], Mapping[str, Any] | None]:
    """One rule of `dynamic`: `-:regex` leaves a module float, `+:regex` or `regex` changes its config."""
    compiled = safe_pattern(pattern.removeprefix("-:").removeprefix("+:"), where)
    if pattern.startswith("-:"):
        return compiled, None
    if not isinstance(changes, dict):
        raise UserError(
            "the overrides of a module are no object", where=where, expected="an object", found=repr(changes)
        )
    return compiled, {key: changes[key] for key in OVERRIDES if key in changes}


@dataclass(frozen=True)
class GptqRows:
    """Unpacks a GPTQ layer into `Codes`, a strip of output channels at a time.

    `places` is the stored group of each group of the result; `order` puts its inputs beside one another.
    """

    path: str
    shape: tuple[int, int]
    qweight: FileTensor
    qzeros: FileTensor
    scales: FileTensor
    zero_offset: int
    bits: int
    symmetric: bool
    order: Order | None
    places: tuple[int, ...]

    def parameters(self) -> tuple[Array, Array]:
        places = np.array(self.places)
        scale, zero = checked_scales(self.scales)[places], self.zeros()[places]
        return np.ascontiguousarray(scale.T), np.ascontiguousarray(zero.T)

    def tiles(self) -> Iterator[Tile]:
        n, k = self.shape
        scale, zero = self.parameters()
        indices = None if self.order is None else self.order.indices.astype(np.int64)
        for start, stop in strips(n, k):
            words = self.qweight.columns(start, stop)
            codes = unpack(words.T, self.bits)[:, :k]
            codes = codes if indices is None else np.take(codes, indices, axis=1)  # ten times codes[:, indices]
            yield Tile(start, Codes(codes, scale[start:stop], zero[start:stop]))

    def zeros(self) -> Array:
        """uint8 [G, N]."""
        ones = np.uint32(sum(1 << shift for shift in range(0, 32, self.bits)))
        # The offset was taken off the packed word, borrows included, so it goes back onto the packed word.
        words = whole(self.qzeros).view(np.uint32) + ones * np.uint32(self.zero_offset)
        zero = unpack(words, self.bits)[:, : self.shape[0]]
        central = 1 << (self.bits - 1)
        if self.symmetric and (zero != central).any():
            raise UserError(
                "the config says sym=true, but zero points differ from the centre",
                where=f"{self.path}.qzeros",
                expected=str(central),
                found=str(sorted(set(zero[zero != central].tolist()))[:5]),
                fix="the checkpoint_format may be the other one of gptq and gptq_v2, or sym may be false",
            )
        return zero
