"""One GGUF file, or the parts of a split one: its metadata as Python values, its tensors as references.

The `gguf` package reads it, over a view that ends where the file does: the package itself believes what the file says
of its own lengths. No weight is read here.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from glob import escape
from pathlib import Path
from typing import Any

from instantrt.compiler.frontend.gguf import SPLIT
from instantrt.compiler.quant.gguf import GgufTensor
from instantrt.passes.core.errors import UserError, require, tried
from instantrt.passes.core.lazy import FLOAT32

COPY = "the file may be truncated, or a Git LFS pointer: compare its size with the original and copy it again"
MOST_DIMENSIONS = 4  # ggml's own


@dataclass(frozen=True)
class GgufFile:
    """What a file holds. `tensors` by the names in the file, shapes as torch has them: the last dimension is the one
    that lies together; `digest` is of all but the weights."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    digest: str


def open_gguf(path: Path) -> GgufFile:
    """The file at `path`, with the other parts where it is one of several."""
    require("hf", "reading a GGUF file")
    parts = parts_beside(path)
    opened = [open_part(each, each.stat().st_mtime_ns, each.stat().st_size) for each in parts]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(opened):
        check_split(part, number, len(parts))
        for name, tensor in part.tensors.items():
            if tensors.setdefault(name, tensor) is not tensor:
                found = f"{tensors[name].path.name}, {part.path.name}"
                raise UserError(f"tensor {name} is in two parts", where=str(path.parent), found=found)
    expected = opened[0].metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        told = f"{expected} in all parts"
        raise UserError("tensors are missing", where=str(path), expected=told, found=str(len(tensors)), fix=COPY)
    return GgufFile(path, opened[0].metadata, tensors, opened[0].digest)


def parts_beside(path: Path) -> list[Path]:
    """The files of a split one, whichever of them is named; else the file itself."""
    named = SPLIT.match(path.name)
    if named is None:
        return [path]
    stem, _, count = named.groups()
    have = len(list(path.parent.glob(f"{escape(stem)}-*-of-{count}.gguf")))
    if not 1 <= int(count) <= have:
        raise UserError(
            "parts of a split file are missing",
            where=str(path.parent),
            expected=f"{int(count)} files {stem}-*-of-{count}.gguf",
            found=str(have),
            fix="download all of them into one folder",
        )
    return [path.with_name(f"{stem}-{i:05}-of-{count}.gguf") for i in range(1, int(count) + 1)]


def check_split(part: GgufFile, number: int, count: int) -> None:
    """Is a part the one that its name says?"""
    said = part.metadata.get("split.no", 0), part.metadata.get("split.count", 1) or 1
    if said != (number, count):
        raise UserError(
            "a part of a split file says that it is another",
            where=str(part.path),
            expected=f"part {number + 1} of {count}",
            found=f"split.no {said[0]!r}, split.count {said[1]!r}",
            fix="name the first of the parts as they were downloaded; files of one split lie in one folder",
        )


@lru_cache(maxsize=4)  # it is asked for its config, its tokenizer and its tensors in turn
def open_part(path: Path, changed: int, size: int) -> GgufFile:  # noqa: ARG001  (who changes it gets another)
    if size < 1:
        raise UserError("not a readable GGUF file", where=str(path), found="an empty file", fix=COPY)
    with tried("reading the GGUF file's header", where=str(path), fix=COPY):
        reader = reader_class()(path)
        if reader.byte_order == "S":
            raise UserError(
                "a big-endian GGUF file",
                where=str(path),
                expected="little-endian, as nearly all are",
                fix="gguf-convert-endian, of the gguf package, turns it around",
            )
        metadata = {key: value_of(field) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        tensors = dict(tensors_of(path, reader))
        digest = hashlib.sha256(reader.data[: reader.data_offset]).hexdigest()
    return GgufFile(path, metadata, tensors, digest)


@cache
def reader_class() -> Any:
    """gguf.GGUFReader, which believes in no length that reaches beyond the file."""
    from gguf import GGUFReader, GGUFValueType

    class Bounded(GGUFReader):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            found = super()._get(offset, dtype, count, override_order)
            if len(found) != count:
                raise ValueError(f"{count} numbers announced at byte {offset}, and the file ends at {len(self.data)}")
            return found

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            """An array as one part, bytes or numbers: the package makes two arrays of each token of a vocabulary, which
            takes ten seconds for 262144."""
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            inner, count = int(self._get(orig_offs, "<u4")[0]), int(self._get(orig_offs + 4, "<u8")[0])
            kind, start = GGUFValueType(inner), orig_offs + 12
            if kind is GGUFValueType.STRING:
                end = start
                for _ in range(count):  # each takes eight bytes at least, so that the file's end comes before long
                    end += 8 + struct.unpack_from("<Q", memoryview(self.data), end)[0]
                part = self._get(start, "u1", end - start)
            elif kind in self.gguf_scalar_to_np:
                part = self._get(start, self.gguf_scalar_to_np[kind], count)
            else:
                raise ValueError(f"an array of {kind.name.lower()}s")
            return 12 + part.nbytes, [part], [0], [GGUFValueType.ARRAY, kind]

    return Bounded


def value_of(field: Any) -> Any:
    """A metadata value as Python has it."""
    from gguf import GGUFValueType

    part = field.parts[field.data[0]]
    if field.types[0] is GGUFValueType.STRING:
        return bytes(part).decode("utf-8")
    if field.types[0] is not GGUFValueType.ARRAY:
        return part[0].item()
    return list(strings(bytes(part))) if field.types[1] is GGUFValueType.STRING else part.tolist()


def strings(data: bytes) -> Iterator[str]:
    """Strings behind their lengths; a vocabulary may have a token that is no UTF-8."""
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield data[at + 8 : at + 8 + length].decode("utf-8", "replace")
        at += 8 + length


def tensors_of(path: Path, reader: Any) -> Iterator[tuple[str, GgufTensor]]:
    """The tensors, each within the file and beside the others."""
    from gguf import GGML_QUANT_SIZES

    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda t: t.data_offset):
        kind, shape = tensor.tensor_type, tuple(int(d) for d in reversed(tensor.shape))
        weights, size = GGML_QUANT_SIZES[kind]
        at, bytes_of = int(tensor.data_offset), math.prod(shape) // weights * size
        right = 1 <= len(shape) <= MOST_DIMENSIONS and min(shape) > 0 and shape[-1] % weights == 0
        if not right or bytes_of != tensor.n_bytes or not end <= at <= len(reader.data) - bytes_of:
            raise UserError(
                f"tensor {tensor.name} cannot be in the file",
                where=str(path),
                expected=f"rows of whole blocks of {weights}, between bytes {end} and {len(reader.data)}",
                found=f"shape {list(shape)} {kind.name}, {bytes_of} bytes at {at}",
                fix=COPY,
            )
        end = at + bytes_of
        yield tensor.name, GgufTensor(path, at, shape, FLOAT32, tensor.name, kind.name, (weights, size))
