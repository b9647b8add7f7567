"""Which reader a checkpoint needs: its quantization config, wherever it is kept, and the table of methods.

A method without a reader is refused by its name, before any tensor is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from instantrt.compiler.json_file import read_json
from instantrt.compiler.quant import awq, compressed, gguf, gptq, plain
from instantrt.compiler.quant.config import expect
from instantrt.compiler.quant.stored import Reader
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FileTensor

READERS: dict[str, Callable[[Mapping[str, Any], str], Reader]] = {
    "gptq": gptq.parse_gptq,
    "awq": awq.parse_awq,
    "compressed-tensors": compressed.parse_compressed,
    "w8a8_int8": plain.parse_plain,
}
INSIDE = ("quantization_config", "compression_config")  # the second is compressed-tensors' older name
BESIDE = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
AGREE = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "dynamic", "zero_point", "version")
# Keys of GPTQModel for what it computes besides products with the weights: docs/facts.md, "What GPTQModel adds".
BESIDE_WEIGHTS = {"rotation": "rotates inputs as the model runs", "adapter": "adds a LoRA adapter as the model runs"}
# A key that only one method's config has, where the config does not name its method.
METHOD_OF = {
    "w_bit": "awq",
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "quant_algo": "modelopt",
    "producer": "modelopt",
    "config_groups": "compressed-tensors",
    "desc_act": "gptq",
    "damp_percent": "gptq",
    "bits": "gptq",
}


def unannounced_reader(tensors: Mapping[str, FileTensor]) -> Reader | None:
    """The reader for tensors that no config says anything of: the tensors tell."""
    return gguf.detect(tensors) or plain.detect(tensors)


def announced_reader(folder: Path, config: Mapping[str, Any]) -> Reader | None:
    """The reader that the checkpoint's configs ask for; a method that has none is refused by its name.

    What only one of several configs says counts as well: of those libraries that read them each opens one.
    """
    stored = find_configs(folder, config)
    for raw, where in stored:
        method = method_of(raw)
        kind = raw.get("quant_algo") or raw.get("bnb_4bit_quant_type") or raw.get("fmt")
        what = f"a checkpoint quantized by {method} cannot be read"
        fix = "compile from the float model with --quant, or quantize it to one of these formats"
        found = f"{method} ({kind})" if isinstance(kind, str) else method
        expect(isinstance(method, str) and method in READERS, found, what, ", ".join(READERS), where, fix)
        for key, why in BESIDE_WEIGHTS.items():
            expect(not raw.get(key), raw.get(key), f"a checkpoint whose {key} {why}", f"no {key}", where, fix)
    if not stored:
        return None
    together = {key: value for raw, _ in reversed(stored) for key, value in raw.items()}
    return READERS[method_of(together)](together, stored[0][1])


def method_of(raw: Mapping[str, Any]) -> Any:
    """The method's name as a config gives it, or as its keys tell; `none named` where they do not."""
    named = raw.get("quant_method") or raw.get("method")
    return named or next((method for key, method in METHOD_OF.items() if key in raw), "none named")


def find_configs(folder: Path, config: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    """(quantization config, the file it is from): in config.json, and in files beside it. All must agree."""
    found = [(config[key], str(folder / "config.json")) for key in INSIDE if config.get(key) is not None]
    if isinstance(config.get("quantization"), dict):  # MLX's key
        found += [({"quant_method": "mlx", **config["quantization"]}, str(folder / "config.json"))]
    found += [(read_json(folder / name), str(folder / name)) for name in BESIDE if (folder / name).is_file()]
    for raw, where in found:
        if not isinstance(raw, dict):
            raise UserError("the quantization config is no JSON object", where=where, found=repr(raw))
    found = [({key: value for key, value in raw.items() if value is not None}, where) for raw, where in found]
    for raw, where in found[1:]:
        first, first_where = found[0]
        for key in AGREE:
            if key in raw and key in first and raw[key] != first[key]:
                raise UserError(
                    f"{key} differs between two configs of the same checkpoint",
                    where=where,
                    expected=f"{first[key]!r} as in {first_where}",
                    found=repr(raw[key]),
                    fix="remove the file that belongs to another checkpoint",
                )
    return [(raw, where) for raw, where in map(inner, found) if raw]


def inner(config: tuple[Mapping[str, Any], str]) -> tuple[Mapping[str, Any], str]:
    """A config without ModelOpt's envelope; empty where that says that nothing is quantized."""
    raw, where = config
    if not isinstance(raw.get("quantization"), dict):
        return config
    said = {key: value for key, value in raw["quantization"].items() if value}
    return ({"quant_method": "modelopt", **said} if {"quant_algo", "kv_cache_quant_algo"} & set(said) else {}), where
