"""Safetensors checkpoints as references: every tensor's file, offset, shape and type; no bytes are read here."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from instantrt.compiler.json_file import read_json
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FileTensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in (
        ("F64", np.float64),
        ("F32", np.float32),
        ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16),
        ("I64", np.int64),
        ("I32", np.int32),
        ("I16", np.int16),
        ("I8", np.int8),
        ("U8", np.uint8),
        ("BOOL", np.bool_),
        # Of quantized checkpoints that nothing here reads; which method wrote them is told from the config.
        ("U16", np.uint16),
        ("U32", np.uint32),
        ("U64", np.uint64),
        ("C64", np.complex64),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
        ("F8_E4M3FNUZ", ml_dtypes.float8_e4m3fnuz),
        ("F8_E5M2FNUZ", ml_dtypes.float8_e5m2fnuz),
        ("F8_E8M0", ml_dtypes.float8_e8m0fnu),
        ("F6_E2M3", ml_dtypes.float6_e2m3fn),
        ("F6_E3M2", ml_dtypes.float6_e3m2fn),
        ("F4", ml_dtypes.float4_e2m1fn),
    )
}
PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # of the types that take less than a byte there
# A header of a model with a million tensors is below this; the format's own limit is the same.
MAX_HEADER = 100_000_000
COPY = "the file may be truncated, or a Git LFS pointer: compare its size with the original and copy it again"


def read_checkpoint(folder: Path) -> Mapping[str, FileTensor]:
    """Every tensor of the checkpoint in `folder`, single-file or sharded."""
    if (folder / INDEX).is_file():
        announced = weight_map_of(folder / INDEX)
        files = sorted(set(announced.values()))
        if (folder / SINGLE).is_file() and files != [SINGLE]:
            raise UserError(
                f"both {SINGLE} and {INDEX} are here, and they are different weights",
                where=str(folder),
                expected="one of them",
                found=f"{SINGLE}, and an index of {', '.join(files[:3])}{', ...' if files[3:] else ''}",
                fix="remove the one that is stale; transformers would take the single file",
            )
        return read_shards(folder, announced)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    shards = sorted(folder.glob("*.safetensors"))
    for path in shards:
        if not path.is_file():  # to read a pipe would wait for somebody to write it
            raise UserError(
                "weights that are no file",
                where=str(path),
                found=f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "",
                fix="download or copy the checkpoint again, with what its links point to",
            )
    if len(shards) == 1:
        return read_header(shards[0])
    if shards:
        raise UserError(
            "several safetensors files, and nothing says which of them are the model",
            where=str(folder),
            expected=f"{SINGLE}, or {INDEX} with its shards",
            found=", ".join(path.name for path in shards[:12]),
            fix="download the index, too; remove files of other models",
        )
    graphs = sorted(path for path in folder.glob("*.onnx") if path.is_file())
    pickles = "convert pickled weights (.bin, .pt) with transformers' save_pretrained; pickles are never loaded"
    raise UserError(
        "no safetensors weights",
        where=str(folder),
        expected=f"{SINGLE}, or {INDEX} with its shards",
        found=", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "an empty folder",
        fix=f"name the graph itself to compile that: {graphs[0]}" if graphs else pickles,
    )


def weight_map_of(index: Path) -> dict[str, str]:
    """Tensor -> the name of its file, which lies beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError("not a shard index", where=str(index), expected='an object "weight_map" of tensor to file name')
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file == "..":
            raise UserError(
                "the shard index points outside its folder",
                where=str(index),
                expected="plain file names",
                found=repr(file),
                fix="do not use this checkpoint unless you trust where it came from",
            )
    return weight_map


def read_shards(folder: Path, weight_map: Mapping[str, str]) -> Mapping[str, FileTensor]:
    """The tensors of an index's shards: all that it announces, each once."""
    files = sorted(set(weight_map.values()))
    lost = [file for file in files if not (folder / file).is_file()]
    if lost:
        raise UserError(
            f"shard {lost[0]} is missing",
            where=str(folder),
            found=f"{len(files) - len(lost)} of the {len(files)} shards that {INDEX} names",
            fix="download the checkpoint again, all shards of it, or remove the index if it belongs to another save",
        )
    tensors: dict[str, FileTensor] = {}
    for file in files:
        for name, tensor in read_header(folder / file).items():
            first = tensors.setdefault(name, tensor)
            if first is not tensor and not same_bytes(first, tensor):
                raise UserError(
                    f"tensor {name} is in two shards, and differs",
                    where=str(folder),
                    found=f"{first.path.name} and {file}",
                    fix="shards of two saves were mixed: copy the checkpoint again into an empty folder",
                )
    absent = sorted(name for name in weight_map if name not in tensors)
    if absent:
        raise UserError(
            "tensors that the index announces are in no shard",
            where=str(folder / INDEX),
            found=", ".join(absent[:5]),
        )
    return tensors


def same_bytes(a: FileTensor, b: FileTensor) -> bool:
    """Are they equal, bit for bit? Read tile by tile: embedding tables take gigabytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    tiles = zip(a.tiles(), b.tiles(), strict=True)
    return all(x.parts[0].tobytes() == y.parts[0].tobytes() for x, y in tiles)


def read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of one file. The safetensors library checks the header; offsets are then read from it."""
    try:
        with path.open("rb") as file:  # first: the library calls a file that it may not read one that is not there
            with safe_open(path, "np"):
                pass
            (size,) = struct.unpack("<Q", file.read(8))
            assert size <= MAX_HEADER  # the library has refused it already
            header: dict[str, Any] = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError, struct.error) as error:
        raise UserError(
            "not a readable safetensors file",
            where=str(path),
            found=str(error),
            fix="" if isinstance(error, PermissionError) else COPY,
        ) from None
    header.pop("__metadata__", None)
    return {name: file_tensor(path, 8 + size, name, info) for name, info in header.items()}


def file_tensor(path: Path, base: int, name: str, info: Mapping[str, Any]) -> FileTensor:
    dtype = DTYPES.get(info["dtype"])
    if dtype is None:
        raise UserError(
            f"tensor {name} has a type that is not supported",
            where=str(path),
            expected=", ".join(DTYPES),
            found=str(info["dtype"]),
        )
    begin, end = info["data_offsets"]
    shape = tuple(info["shape"])
    size = -(-math.prod(shape) * PACKED_BITS.get(info["dtype"], 8 * dtype.itemsize) // 8)
    if end - begin != size:
        raise UserError(
            f"tensor {name} has a size that does not fit its shape",
            where=str(path),
            expected=f"{size} bytes for {list(shape)} {info['dtype']}",
            found=f"{end - begin} bytes",
        )
    return FileTensor(path, base + begin, shape, dtype, name)
