"""The quantization a user asks for: the spec's keys, validated at once; nothing is ignored silently."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from instantrt.passes.core.errors import UserError

Quant = Literal["a16w8", "a16w4", "a8w8", "a8w4", "none"]
# The command line's short names, as the spec's keys.
SHORT: dict[str, dict[str, str]] = {
    "a16w8": {"weight_format": "int8", "compute_method": "weight_only"},
    "a16w4": {"weight_format": "uint4", "compute_method": "weight_only"},
    "a8w8": {"weight_format": "int8", "compute_method": "activate_quant"},
    "a8w4": {"weight_format": "uint4", "compute_method": "activate_quant"},
}
assert set(get_args(Quant)) == {*SHORT, "none"}
# Everything but instant_quant names the format of a checkpoint that is quantized already.
METHODS = ("instant_quant", "gptq", "awq", "compressed-tensors", "int8", "gguf")
FORMATS = {"int8": 8, "uint4": 4}
COMPUTE = ("weight_only", "activate_quant")
Search = Literal["none", "activations"]
FEW = 3
ZERO_POINTS = ("integer", "float")
KEYS = ("quant_method", "weight_format", "group_size", "compute_method", "ignore", "search", "zero_point")


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize. `group_size` -1 is per channel; `ignore` holds module patterns (`*.down_proj`).

    `search` activations fits range and scale of each group to the inputs that it meets; none is the spec's formula.
    `zero_point` float leaves zero points unrounded, as the spec does.
    """

    quant_method: str = "instant_quant"
    weight_format: str = "int8"
    group_size: int = -1
    compute_method: str = "weight_only"
    ignore: tuple[str, ...] = ()
    search: Search = "none"
    zero_point: str = "integer"

    @property
    def bits(self) -> int:
        return FORMATS[self.weight_format]

    @property
    def activate_quant(self) -> bool:
        return self.compute_method == "activate_quant"

    def ignored(self, path: str) -> str | None:
        """The pattern that leaves this module float, if one does."""
        return next((p for p in self.ignore if fnmatchcase(path, p)), None)


def pattern_of(path: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `model.layers.*.mlp.up_proj`."""
    return re.sub(r"\.\d+\.", ".*.", path, count=1)


def or_ignore(paths: Iterable[str]) -> str:
    """The end of an advice: the options that leave these layers float, where they are of a few kinds."""
    patterns = dict.fromkeys(map(pattern_of, paths))
    return ", or " + " ".join(f"--ignore '{p}'" for p in patterns) if len(patterns) <= FEW else ""


def parse_quant_config(raw: Mapping[str, Any], where: str) -> QuantConfig:
    """A validated config from the spec's keys; `where` names the file or argument in errors."""
    unknown = ", ".join(map(repr, sorted(set(raw) - set(KEYS))))
    if unknown:
        raise UserError("unknown quantization key", where=where, expected=", ".join(KEYS), found=unknown)
    choice(raw, "quant_method", METHODS, where)
    if raw.get("quant_method", "instant_quant") == "instant_quant" and "weight_format" not in raw:
        raise UserError("weight_format is missing", where=where, expected=" or ".join(FORMATS), fix='"int8", say')
    if raw.get("weight_format") in ("int4", "uint8"):
        near = {"int4": "uint4", "uint8": "int8"}[raw["weight_format"]]
        raise UserError(
            f"weight_format {raw['weight_format']!r} does not exist: weights are {' or '.join(FORMATS)}",
            where=where,
            found=repr(raw["weight_format"]),
            fix=f"{near!r} has the same number of levels",
        )
    choice(raw, "weight_format", tuple(FORMATS), where)
    choice(raw, "compute_method", COMPUTE, where)
    choice(raw, "search", get_args(Search), where)
    choice(raw, "zero_point", ZERO_POINTS, where)
    expect_group_size(raw.get("group_size", -1), where)
    ignore = raw.get("ignore", ())
    strings = isinstance(ignore, list | tuple) and all(isinstance(p, str) for p in ignore)
    expect(strings, ignore, "ignore is no list", "a list of module patterns", where)
    config = QuantConfig(**{**raw, "ignore": tuple(ignore)})
    if config.quant_method != "instant_quant" and config.search != "none":
        raise UserError(
            "a search says nothing to a checkpoint that is quantized already",
            where=where,
            found=f"search {config.search!r} with quant_method {config.quant_method!r}",
        )
    if config.zero_point == "float":
        plain = config.quant_method == "instant_quant" and config.search == "none" and not config.activate_quant
        found = f"quant_method {config.quant_method}, search {config.search}, compute_method {config.compute_method}"
        what, expected = "zero_point float is the plain formula's", "instant_quant, search none, weight_only"
        expect(plain, found, what, expected, where, "leave zero_point out")
    if config.quant_method == "instant_quant" and config.activate_quant:
        refuse_activate(config, where)
    return config


def refuse_activate(config: QuantConfig, where: str) -> None:
    """Activation quantization of InstantQuant is int8 and per channel, as in the spec."""
    other = "or compute_method weight_only"
    what = "activate_quant takes int8 weights"
    expect(config.weight_format == "int8", config.weight_format, what, "weight_format int8", where, f"int8, {other}")
    what = "activate_quant is per channel only"
    expect(config.group_size == -1, config.group_size, what, "-1", where, f"leave group_size out, {other}")


def choice(raw: Mapping[str, Any], key: str, allowed: tuple[str, ...], where: str) -> None:
    expect(key not in raw or raw[key] in allowed, raw.get(key), f"{key} has no such value", " or ".join(allowed), where)


def expect(right: bool, found: Any, what: str, expected: str, where: str, fix: str = "") -> None:
    """A value of a config that is not right is an error of the user."""
    if not right:
        raise UserError(what, where=where, expected=expected, found=repr(found), fix=fix)


def expect_group_size(value: Any, where: str) -> None:
    right = type(value) is int and (value == -1 or value > 0)
    expect(right, value, "group_size is no size of a group", "-1 (per channel) or a positive integer", where)


def flag(raw: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = default if raw.get(key) is None else raw[key]
    expect(isinstance(value, bool), value, f"{key} is no boolean", "true or false", where)
    return bool(value)


def one_of(raw: Mapping[str, Any], *keys: str, default: Any, where: str) -> Any:
    """What a config says under one of several names for the same; where it says two things, an error."""
    said = {key: raw[key] for key in keys if raw.get(key) is not None}
    values = [value.lower() if isinstance(value, str) else value for value in said.values()]
    expect(values[1:] == values[:-1], said, f"{' and '.join(said)} differ, which mean the same", "one value", where)
    return values[0] if values else default
