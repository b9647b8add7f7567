"""compressed-tensors checkpoints (llmcompressor), bit for bit: integer weights, packed or one a byte.

pack-quantized   weight_packed      int32 [N, ceil(K * bits / 32)]  code + 2^(bits-1), lowest bits first
                 weight_zero_point  int32 [ceil(N * bits / 32), G]  the same offset; absent where symmetric
                 weight_shape       int64 [2];  weight_g_idx int32 [K] with actorder "group"
int-quantized    weight             int8 [N, K];  weight_zero_point int8 [N, G]; absent where symmetric
both             weight_scale       float [N, G], or [1] for a scale of the whole tensor

Which scheme is a layer's follows that library: docs/facts.md, "Which compressed-tensors scheme a layer has".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np

from instantrt.compiler.quant.config import expect, expect_group_size, flag
from instantrt.compiler.quant.stored import (
    FLOATS,
    INT32,
    LEFT_FLOAT,
    Reader,
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
GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
CLASSES = ("Linear", "Module")  # what a linear layer is
Target: TypeAlias = str | re.Pattern[str]  # a module's path or a class, or a pattern of paths


@dataclass(frozen=True)
class Scheme:
    """How the layers of a config group are stored. `group_size` -1 is per channel."""

    packed: bool
    bits: int
    group_size: int
    symmetric: bool
    per_tensor: bool
    activations: Activations


@dataclass(frozen=True)
class CompressedConfig(Reader):
    """What a compressed-tensors checkpoint says of itself; its sizes are those of its main scheme.

    schemes   what each target has; of those that name a layer the first counts, and before those that name its class
    """

    schemes: tuple[tuple[Target, Scheme], ...]
    ignore: tuple[Target, ...]
    bits: int
    group_size: int
    activations: Activations
    mark: str
    notes: tuple[str, ...] = ()

    method = "compressed-tensors"

    def read(self, layer: StoredLayer) -> QuantTensor | Reject:
        weight = layer.find("weight")
        if weight is not None and weight.dtype in FLOATS:
            return LEFT_FLOAT
        scheme = self.scheme(layer.names)
        if scheme is None:
            if layer.find("weight_scale") is None:
                return LEFT_FLOAT
            raise UserError("the config leaves this module float, the checkpoint holds it quantized", where=layer.path)
        return read_layer(layer, scheme)

    def scheme(self, names: Collection[str]) -> Scheme | None:
        """Of the layer with these names; None leaves it float."""
        if any(target in CLASSES or says(target, names) for target in self.ignore):
            return None
        by_name = (scheme for target, scheme in self.schemes if says(target, names))
        by_class = (scheme for target, scheme in self.schemes if target in CLASSES)
        return next(chain(by_name, by_class), None)


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
    order, places = None, tuple(range(groups))
    if layer.find("weight_g_idx") is not None:
        order, places = input_order(layer.part("weight_g_idx", (k,), INT32), group)
    rows = CompressedRows((n, k), bits, weight, scales, zeros, order, places)
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
        return unpack(stored, self.bits) if stored.dtype == INT32 else unsigned(stored, self.bits)

    def zero_points(self, n: int, groups: int) -> Array:
        """uint8 [N, G]."""
        if self.zeros is None:
            return np.full((n, groups), 1 << (self.bits - 1), np.uint8)
        stored = whole(self.zeros)
        if stored.dtype == INT32:
            return unpack(np.ascontiguousarray(stored.T), self.bits)[:, :n].T
        return np.broadcast_to(unsigned(stored, self.bits).reshape(-1, stored.shape[-1]), (n, groups))


def unsigned(signed: Array, bits: int) -> Array:
    """int8 -2^(bits-1) .. 2^(bits-1) - 1 -> uint8 0 .. 2^bits - 1."""
    return (signed.view(np.uint8) + np.uint8(1 << (bits - 1))) & np.uint8((1 << bits) - 1)


def parse_compressed(raw: Mapping[str, Any], where: str) -> CompressedConfig:
    """A reader from `quantization_config`; refuses what is no integer weight."""
    if section(raw, "sparsity_config", where).get("format", "dense") != "dense":
        raise UserError("sparse checkpoints are not supported", where=where, found=repr(raw["sparsity_config"]))
    if raw.get("kv_cache_scheme") or section(raw, "transform_config", where).get("config_groups"):
        raise UserError("a quantized cache or weight transforms (rotations) are not supported", where=where)
    if raw.get("moe_sparsity_config"):
        raise UserError("sparse experts are not supported", where=where, found=repr(raw["moe_sparsity_config"]))
    groups = section(raw, "config_groups", where)
    objects = bool(groups) and all(isinstance(g, dict) for g in groups.values())
    expect(objects, groups, "config_groups is no object", "an object of schemes", where)
    notes: list[str] = []
    schemes: list[Scheme] = []
    targets: dict[str, Scheme] = {}  # one that two groups have is the later one's
    for name, group in groups.items():
        schemes.append(parse_scheme(group, str(raw.get("format")), f"{where}, {name}", notes))
        targets |= dict.fromkeys(strings(group.get("targets"), f"{where}, {name}, targets"), schemes[-1])
    main = next((s for s in schemes if s.activations == "int8"), schemes[0])
    return CompressedConfig(
        tuple((compiled(t, where), targets[t]) for t in sorted(targets, key=lambda t: ("re:" in t, t))),
        ignore=tuple(compiled(t, where) for t in strings(raw.get("ignore"), f"{where}, ignore")),
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
    unknown = [key for key in group if key not in GROUP_KEYS]
    expect(not unknown, unknown, "keys of a config group that are not read", ", ".join(GROUP_KEYS), where)
    outputs = group.get("output_activations")
    expect(outputs is None, outputs, "quantized outputs are not supported", "output_activations null", where)
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


def strings(raw: Any, where: str) -> list[str]:
    """Module paths, class names (`Linear`) or `re:` patterns."""
    right = raw is None or (isinstance(raw, list) and all(isinstance(p, str) for p in raw))
    expect(right, raw, "not a list of modules", "paths, class names or re: patterns", where)
    return raw or []


def compiled(target: str, where: str) -> Target:
    return safe_pattern(target.removeprefix("re:"), where) if target.startswith("re:") else target


def says(target: Target, names: Collection[str]) -> bool:
    """Does it name one of `names`? A pattern need not match to the end."""
    return any(target.match(name) for name in names) if isinstance(target, re.Pattern) else target in names
