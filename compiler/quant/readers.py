"""Which reader a checkpoint needs: its quantization config, wherever it is kept, and the table of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from instantrt.compiler.checkpoint import read_json
from instantrt.compiler.quant import awq, compressed, gptq, plain
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
BESIDE = ("quantize_config.json", "quant_config.json")
AGREE = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "zero_point", "version")


def find_reader(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, FileTensor]) -> Reader | None:
    """The reader for a checkpoint, or None for a float one."""
    stored = find_config(folder, config)
    if stored is None:
        return plain.detect(tensors)
    raw, where = stored
    method = raw.get("quant_method", raw.get("method", "awq" if "w_bit" in raw else "gptq"))
    what = "a quantized checkpoint of this method cannot be read"
    fix = "compile from the float model with --quant, or quantize it to one of these formats"
    expect(method in tuple(READERS), method, what, ", ".join(READERS), where, fix)
    return READERS[method](raw, where)


def find_config(folder: Path, config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str] | None:
    """(quantization config, the file it is from): in config.json, or in a file beside it. Both must agree."""
    found = [(config[key], str(folder / "config.json")) for key in INSIDE if config.get(key) is not None]
    found += [(read_json(folder / name), str(folder / name)) for name in BESIDE if (folder / name).is_file()]
    for raw, where in found:
        if not isinstance(raw, dict):
            raise UserError("the quantization config is no JSON object", where=where, found=repr(raw))
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
    return found[0] if found else None
