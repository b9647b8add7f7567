"""GPTQ checkpoints, bit for bit: codes, scales and zero points are taken as they are, never dequantized.

qweight  int32 [ceil(K * bits / 32), N]      codes of consecutive k, lowest bits first
qzeros   int32 [G, ceil(N * bits / 32)]      zero points of consecutive n; `gptq` stores the packed words less 1 a field
scales   fp16  [G, N]
g_idx    int32 [K]                           the group of each k
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from instantrt.compiler.quant.config import expect, expect_group_size, flag, one_of
from instantrt.compiler.quant.stored import (
    FLOATS,
    INT32,
    LEFT_FLOAT,
    Reader,
    StoredLayer,
    StoredRows,
    check_central,
    checked_scales,
    input_order,
    ranges,
    safe_pattern,
    unpack,
    words_for,
)
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array, FileTensor, whole
from instantrt.passes.core.quant import Activations, Order, QuantTensor
from instantrt.passes.core.rewrite import Reject

FORMATS = {"gptq": 1, "gptq_v2": 0}  # what has to be added to a stored zero
MOST_RULES = 10_000
OVERRIDES = ("bits", "group_size", "sym", "desc_act")
OTHER = ("adapter", "format", "checkpoint_format", "method", "quant_method", "pack_dtype")  # what else is in the files


@dataclass(frozen=True)
class GptqConfig(Reader):
    """What a checkpoint says of itself. `dynamic` holds (pattern, overrides); None for a module that is left float."""

    bits: int
    group_size: int
    symmetric: bool
    zero_offset: int
    reordered: bool = False
    dynamic: tuple[tuple[re.Pattern[str], Mapping[str, Any] | None], ...] = ()
    where: str = ""
    activations: Activations = "float"

    method = "gptq"
    mark = "qweight"

    def module(self, names: Collection[str]) -> GptqConfig | None:
        """The config of the module with these names: the first pattern of `dynamic` that matches changes it, or leaves
        it float. See docs/facts.md, "Which layers a GPTQ or AWQ config means"."""
        for pattern, changes in self.dynamic:
            if any(pattern.match(name) for name in names):
                return None if changes is None else parse_layer(changes, self, f"{self.where}, dynamic")
        return self

    def read(self, layer: StoredLayer) -> QuantTensor | Reject:
        stored = layer.find("qweight") is not None
        config = self.module(layer.names)
        if stored and config is None:
            raise UserError("the config leaves this module float, the checkpoint holds it quantized", where=layer.path)
        if not stored or config is None:
            return LEFT_FLOAT
        (n, k), bits = layer.shape, config.bits
        group = layer.group(config.group_size)
        groups = k // group
        qweight = layer.part("qweight", (words_for(k, bits), n), INT32)
        qzeros = layer.part("qzeros", (groups, words_for(n, bits)), INT32)
        scales = layer.part("scales", (groups, n), *FLOATS)
        order, places = config.order(layer, group)
        rows = GptqRows((n, k), qweight, qzeros, scales, config.zero_offset, bits, config.symmetric, order, places)
        return QuantTensor(
            layer.path, rows, (n, k), bits, group, config.symmetric, scales.dtype, config.activations, order
        )

    def order(self, layer: StoredLayer, group: int) -> tuple[Order | None, tuple[int, ...]]:
        k = layer.shape[1]
        stored = tuple(range(k // group))
        if layer.find("g_idx") is None:
            if self.reordered and group != k:
                raise UserError("desc_act=true, but the checkpoint has no g_idx for this layer", where=layer.path)
            return None, stored
        g_idx = layer.part("g_idx", (k,), INT32)
        order, places = input_order(g_idx, group)
        if not self.reordered and (order is not None or places != stored):
            raise UserError(
                "g_idx puts the inputs in another order than the config says (desc_act=false)",
                where=g_idx.name,
                expected="k // group_size",
                fix="desc_act must be true in the config, or the checkpoint is damaged: libraries disagree here",
            )
        return order, places


def parse_gptq(raw: Mapping[str, Any], where: str) -> GptqConfig:
    """A reader from `quantization_config` or quantize_config.json."""
    name = one_of(raw, "checkpoint_format", "format", default="gptq", where=where)
    fix = "save the checkpoint again in one of these formats; kernel-specific layouts lose what they do not need"
    expect(name in tuple(FORMATS), name, "GPTQ checkpoint_format", " or ".join(FORMATS), where, fix)
    packed = raw.get("pack_dtype", "int32")
    expect(packed == "int32", packed, "GPTQ pack_dtype", "int32", where)
    base = parse_layer(raw, GptqConfig(0, -1, True, FORMATS[name], where=where), where)
    dynamic = raw.get("dynamic") or {}
    small = isinstance(dynamic, dict) and len(dynamic) <= MOST_RULES
    expect(small, dynamic, "GPTQ dynamic", "an object of pattern to overrides", where)
    rules = tuple(override(pattern, changes, f"{where}, dynamic {pattern!r}") for pattern, changes in dynamic.items())
    for _, changes in rules:
        parse_layer(changes or {}, base, f"{where}, dynamic")
    return replace(base, dynamic=rules)


def parse_layer(raw: Mapping[str, Any], base: GptqConfig, where: str) -> GptqConfig:
    """`base` with what `raw` says otherwise, checked."""
    bits, group_size = raw.get("bits", base.bits), raw.get("group_size", base.group_size)
    fix = "2 and 3 bits have no kernels here: quantize to 4 bits" if bits in (2, 3) else ""
    expect(type(bits) is int and bits in (4, 8), bits, "GPTQ bits", "4 or 8", where, fix)
    expect_group_size(group_size, where)
    symmetric, reordered = (flag(raw, *each, where) for each in (("sym", base.symmetric), ("desc_act", base.reordered)))
    activations: Activations = "int8" if bits == 8 else "float"  # as in DashInfer, unless asked otherwise
    said = {"group_size": group_size, "symmetric": symmetric, "reordered": reordered}
    return replace(base, bits=bits, activations=activations, **said)


def override(pattern: str, changes: Any, where: str) -> tuple[re.Pattern[str], Mapping[str, Any] | None]:
    """One rule of `dynamic`: `-:regex` leaves a module float, `+:regex` or `regex` changes its config."""
    compiled = safe_pattern(pattern.removeprefix("-:").removeprefix("+:"), where)
    if pattern.startswith("-:"):
        return compiled, None
    expect(isinstance(changes, dict), changes, "the overrides of a module are no object", "an object", where)
    other = [key for key in OTHER if changes.get(key) is not None]
    expect(not other, other, "a module with overrides that are not read", ", ".join(OVERRIDES), where)
    return compiled, {key: changes[key] for key in OVERRIDES if key in changes}


@dataclass(frozen=True)
class GptqRows(StoredRows):
    """Unpacks a GPTQ layer. `places` is the stored group of each group of the result."""

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

    def strips(self) -> Iterator[tuple[int, Array]]:
        n, k = self.shape
        for start, stop in ranges(n, k):
            yield start, unpack(self.qweight.columns(start, stop).T, self.bits)[:, :k]

    def zeros(self) -> Array:
        """uint8 [G, N]."""
        ones = np.uint32(sum(1 << shift for shift in range(0, 32, self.bits)))
        # The offset was taken off the packed word, borrows included, so it goes back onto the packed word.
        words = whole(self.qzeros).view(np.uint32) + ones * np.uint32(self.zero_offset)
        zero = unpack(words, self.bits)[:, : self.shape[0]]
        fix = "the checkpoint_format may be the other one of gptq and gptq_v2, or sym may be false"
        return check_central(zero, self.bits, "sym=true", self.qzeros, fix) if self.symmetric else zero
