"""compressed-tensors checkpoints (llmcompressor), bit for bit: integer weights, packed or one a byte.

pack-quantized   weight_packed      int32 [N, ceil(K * bits / 32)]  code + 2^(bits-1), lowest bits first
                 weight_zero_point  int32 [ceil(N * bits / 32), G]  the same offset; absent where symmetric
                 weight_shape       int64 [2];  weight_g_idx int32 [K] with actorder "group"
int-quantized    weight             int8 [N, K];  weight_zero_point int8 [N, G]; absent where symmetric
both             weight_scale       float [N, G], or [1] for a scale of the whole tensor
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from instantrt.compiler.quant.config import expect, expect_group_size, flag
from instantrt.compiler.quant.stored import (
    FLOATS,
    INT32,
    LEFT_FLOAT,
    StoredLayer,
    StoredRows,
    checked_scales,
    input_order,
    safe_pattern,
    unpack,
    words_for,
)
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array, FileTensor, whole
from instantrt.passes.core.quant import Activations, Order, QuantTensor
from instantrt.passes.core.rewrite import Reject

INT8, INT64 = np.dtype(np.int8), np.dtype(np.int64)
PACKED, BYTES = "pack-quantized", "int-quantized"
STRATEGIES = ("group", "channel", "tensor")


@dataclass(frozen=True)
class Scheme:
    """One config group: which layers, and how they are stored. `group_size` -1 is per channel."""

    targets: tuple[str | re.Pattern[str], ...]
    packed: bool
    bits: int
    group_size: int
    symmetric: bool
    per_tensor: bool
    activations: Activations

    def takes(self, path: str) -> bool:
        return any(matches(target, path) for target in self.targets)


@dataclass(frozen=True)
class CompressedConfig:
    """What a compressed-tensors checkpoint says of itself; its sizes are those of its main scheme."""

    schemes: tuple[Scheme, ...]
    ignore: tuple[str | re.Pattern[str], ...]
    bits: int
    group_size: int
    activations: Activations
    mark: str
    notes: tuple[str, ...]

    method = "compressed-tensors"

    def read(self, layer: StoredLayer) -> QuantTensor | Reject:
        weight = layer.find("weight")
        if weight is not None and weight.dtype in FLOATS:
            return LEFT_FLOAT
        scheme = next((s for s in self.schemes if s.takes(layer.path)), None)
        if scheme is None or any(matches(pattern, layer.path) for pattern in self.ignore):
            if layer.find("weight_scale") is None:
                return LEFT_FLOAT
            raise UserError("the config leaves this module float, the checkpoint holds it quantized", where=layer.path)
        return read_layer(layer, scheme)


def read_layer(layer: StoredLayer, scheme: Scheme) -> QuantTensor:
    (n, k), bits = layer.shape, scheme.bits
    group = layer.group(scheme.group_size)
    groups = k // group
    if scheme.packed:
        weight = layer.part("weight_packed", (n, words_for(k, bits)), INT32)
        shape = whole(layer.part("weight_shape", (2,), INT64)).tolist()
        expect(shape == [n, k], shape, "weight_shape is not the layer's", str([n, k]), layer.path)
    else:
        weight = layer.part("weight", (n, k), INT8)
    scales = layer.part("weight_scale", (1,) if scheme.per_tensor else (n, groups), *FLOATS)
    zeros = None
    if not scheme.symmetric:
        packed = (words_for(n, bits), groups), INT32
        plain = (1,) if scheme.per_tensor else (n, groups), INT8
        zeros = layer.part("weight_zero_point", *(packed if scheme.packed and not scheme.per_tensor else plain))
    elif (stored := layer.find("weight_zero_point")) is not None and whole(stored).any():
        raise UserError("a symmetric weight has zero points that are not 0", where=stored.name)
    order, places = None, np.arange(groups)
    if layer.find("weight_g_idx") is not None:
        order, places = input_order(layer.part("weight_g_idx", (k,), INT32), group)
    rows = CompressedRows((n, k), bits, weight, scales, zeros, order, tuple(int(p) for p in places))
    return QuantTensor(layer.path, rows, (n, k), bits, group, scheme.symmetric, scales.dtype, scheme.activations, order)


@dataclass(frozen=True)
class CompressedRows(StoredRows):
    """Decodes a layer: signed codes become the same less -2^(bits-1)."""

    shape: tuple[int, int]
    bits: int
    weight: FileTensor
    scales: FileTensor
    zeros: FileTensor | None = None
    order: Order | None = None
    places: tuple[int, ...] = (0,)

    def parameters(self) -> tuple[Array, Array]:
        n, groups, places = self.shape[0], len(self.places), np.array(self.places)
        scale = checked_scales(self.scales).reshape(self.scales.shape[0], -1)
        return np.broadcast_to(scale, (n, groups))[:, places], self.zero_points(n, groups)[:, places]

    def strips(self) -> Iterator[tuple[int, Array]]:
        for start, (stored,) in self.weight.tiles():
            yield start, self.codes(stored)[:, : self.shape[1]]

    def codes(self, stored: Array) -> Array:
        return unpack(stored, self.bits) if stored.dtype == INT32 else shifted(stored, self.bits)

    def zero_points(self, n: int, groups: int) -> Array:
        """uint8 [N, G]."""
        if self.zeros is None:
            return np.full((n, groups), 1 << (self.bits - 1), np.uint8)
        stored = whole(self.zeros)
        if stored.dtype == INT32:
            return unpack(np.ascontiguousarray(stored.T), self.bits)[:, :n].T
        return np.broadcast_to(shifted(stored, self.bits).reshape(-1, stored.shape[-1]), (n, groups))


def shifted(signed: Array, bits: int) -> Array:
    """int8 -2^(bits-1) .. 2^(bits-1) - 1 -> uint8 0 .. 2^bits - 1."""
    return (signed.view(np.uint8) + np.uint8(1 << (bits - 1))) & np.uint8((1 << bits) - 1)


def parse_compressed(raw: Mapping[str, Any], where: str) -> CompressedConfig:
    """A reader from `quantization_config`; refuses what is no integer weight."""
    if section(raw, "sparsity_config", where).get("format", "dense") != "dense":
        raise UserError("sparse checkpoints are not supported", where=where, found=repr(raw["sparsity_config"]))
    if raw.get("kv_cache_scheme") or section(raw, "transform_config", where).get("config_groups"):
        raise UserError("a quantized cache or weight transforms (rotations) are not supported", where=where)
    groups = section(raw, "config_groups", where)
    objects = bool(groups) and all(isinstance(g, dict) for g in groups.values())
    expect(objects, groups, "config_groups is no object", "an object of schemes", where)
    notes: list[str] = []
    schemes = tuple(
        parse_scheme(group, str(raw.get("format")), f"{where}, {name}", notes) for name, group in groups.items()
    )
    main = next((s for s in schemes if s.activations == "int8"), schemes[0])
    return CompressedConfig(
        schemes,
        ignore=patterns(raw.get("ignore") or [], f"{where}, ignore"),
        bits=main.bits,
        group_size=main.group_size,
        activations=main.activations,
        mark="weight_packed" if main.packed else "weight",
        notes=tuple(dict.fromkeys(notes)),
    )


def section(raw: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An object of the config, empty where it is absent."""
    value = raw.get(key)
    expect(isinstance(value, dict | None), value, key, "an object", where)
    return value or {}


def parse_scheme(group: Mapping[str, Any], default_format: str, where: str, notes: list[str]) -> Scheme:
    form = group.get("format") or default_format
    expect(form in (PACKED, BYTES), form, "compressed-tensors format", f"{PACKED} or {BYTES}", where)
    weights: Any = group.get("weights")
    plain = isinstance(weights, dict) and weights.get("type", "int") == "int" and not weights.get("dynamic")
    expect(plain, weights, "weights are quantized in a way that is not read", "static integers", where)
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    readable = type(bits) is int and bits in ((4, 8) if form == PACKED else (8,))
    expect(readable, bits, "num_bits is a width that is not read", "4 or 8, 8 unless packed", where)
    expect(strategy in STRATEGIES, strategy, "weight strategy", " or ".join(STRATEGIES), where)
    group_size = weights.get("group_size") if strategy == "group" else -1
    expect_group_size(group_size, where)
    return Scheme(
        targets=patterns(group.get("targets") or [], f"{where}, targets"),
        packed=form == PACKED,
        bits=bits,
        group_size=int(group_size),
        symmetric=flag(weights, "symmetric", True, where),
        per_tensor=strategy == "tensor",
        activations=parse_activations(group.get("input_activations"), where, notes),
    )


def parse_activations(raw: Any, where: str, notes: list[str]) -> Activations:
    """Float, or int8 per token as they come. Static scales are replaced by those, which is finer, and noted."""
    if raw is None:
        return "float"
    int8 = isinstance(raw, dict) and raw.get("type", "int") == "int" and raw.get("num_bits") == 8
    expect(int8, raw, "input_activations are of a kind that is not read", "none, or int with 8 bits", where)
    if not raw.get("dynamic"):
        notes.append("the checkpoint's static activation scales are not used: every token gets its own scale")
    elif raw.get("strategy") != "token" or not raw.get("symmetric", True):
        notes.append("activations are quantized per token and symmetric, whatever the checkpoint's config says")
    return "int8"


def patterns(raw: Any, where: str) -> tuple[str | re.Pattern[str], ...]:
    """Module paths, class names (`Linear`) or `re:` patterns."""
    strings = isinstance(raw, list) and all(isinstance(p, str) for p in raw)
    expect(strings, raw, "not a list of modules", "paths, class names or re: patterns", where)
    return tuple(safe_pattern(p.removeprefix("re:"), where) if p.startswith("re:") else p for p in raw)


def matches(pattern: str | re.Pattern[str], path: str) -> bool:
    return bool(pattern.match(path)) if isinstance(pattern, re.Pattern) else pattern in (path, "Linear")
