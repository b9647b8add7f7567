"""What the formats of quantized checkpoints have in common: checked tensors, packed fields, input order, decisions.

A `Reader` is a checkpoint's parsed quantization config. It turns one layer's tensors into a `QuantTensor`, bit for bit,
and refuses by name what that cannot express.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from instantrt.compiler.quant.config import QuantConfig, expect
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import BFLOAT16, FLOAT32, Array, FileTensor, Tile, convert, whole
from instantrt.passes.core.linear import Linear
from instantrt.passes.core.quant import Activations, Codes, Order, QuantTensor
from instantrt.passes.core.rewrite import Reject
from instantrt.passes.qdq.insert_qdq import Decisions

FLOATS = (np.dtype(np.float16), BFLOAT16, FLOAT32)
INT32 = np.dtype(np.int32)
WEIGHTS = ("weight", "weight_packed", "qweight")
TILE_CODES = 1 << 22
LEFT_FLOAT = Reject("the checkpoint leaves this layer float")


@dataclass(frozen=True)
class StoredLayer:
    """One linear of the model, `shape` [N, K], and the checkpoint's tensors."""

    path: str
    shape: tuple[int, int]
    tensors: Mapping[str, FileTensor]

    def find(self, name: str) -> FileTensor | None:
        return self.tensors.get(f"{self.path}.{name}")

    @property
    def names(self) -> tuple[str, ...]:
        """The paths that a config may call it by: today's, and the one that its tensors have in the file."""
        stored = (t.name.rpartition(".")[0] for part in WEIGHTS if (t := self.find(part)) is not None)
        return tuple(dict.fromkeys((self.path, *stored)))

    def part(self, name: str, shape: tuple[int, ...], *dtypes: np.dtype[Any]) -> FileTensor:
        """The tensor `path.name`, which must have this shape and one of these types."""
        tensor = self.find(name)
        if tensor is None:
            raise UserError(f"the checkpoint has no {name} for this layer", where=self.path)
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise UserError(
                f"{name} disagrees with the checkpoint's quantization config",
                where=f"{self.path}.{name}",
                expected=f"{list(shape)} {' or '.join(str(d) for d in dtypes)}",
                found=f"{list(tensor.shape)} {tensor.dtype}",
                fix="bits or group_size in the config belong to another checkpoint, or the file is damaged",
            )
        return tensor

    def group(self, group_size: int) -> int:
        """`group_size`, or K for -1; it must divide K."""
        k = self.shape[1]
        group = k if group_size == -1 else group_size
        what = "group_size does not divide the layer's input width"
        expect(k % group == 0, group, what, f"a divisor of {k}", self.path)
        return group


class StoredRows(ABC):
    """The source of a layer that a checkpoint holds quantized. `order` puts the inputs of a group together."""

    order: Order | None

    @abstractmethod
    def parameters(self) -> tuple[Array, Array]:
        """scale float32 [N, G] and zero uint8 [N, G], read whole and checked; the codes stay where they are."""

    @abstractmethod
    def strips(self) -> Iterator[tuple[int, Array]]:
        """(the first row, codes uint8 [rows, K] in the stored order), some output channels at a time."""

    def tiles(self) -> Iterator[Tile]:
        scale, zero = self.parameters()
        indices = None if self.order is None else self.order.indices.astype(np.int64)
        for start, stored in self.strips():
            codes = stored if indices is None else np.take(stored, indices, axis=1)  # ten times stored[:, indices]
            rows = slice(start, start + len(codes))
            yield Tile(start, Codes(codes, scale[rows], zero[rows]))


class Reader(ABC):
    """A checkpoint's own quantization.

    method       its name in the config
    bits         of the layers that no override changes
    group_size   of the same, -1 per channel
    activations  what the checkpoint was made to run with: int8 where a layer of it was
    mark         the tensor that a quantized layer has
    notes        what a user should know of how it is read
    """

    method: str
    bits: int
    group_size: int
    activations: Activations
    mark: str
    notes: tuple[str, ...] = ()

    @abstractmethod
    def read(self, layer: StoredLayer) -> QuantTensor | Reject:
        """The layer as it is stored and with the activations it was made for, or why it is float."""


def decide(
    linears: Iterable[Linear],
    tensors: Mapping[str, FileTensor],
    reader: Reader,
    config: QuantConfig,
) -> Decisions:
    """Path -> the checkpoint's own quantization of it, or why it stays float.

    Where `config` asks for int8 activations, the layers meet them that the checkpoint made for them; where it made
    none, those of its main width.
    """
    decisions: dict[str, QuantTensor | Reject] = {}
    for found in linears:
        quant = reader.read(StoredLayer(found.path, found.shape, tensors))
        if isinstance(quant, QuantTensor):
            if pattern := config.ignored(found.path):
                raise UserError(
                    "an ignored layer is stored only quantized", where=found.path, found=f"ignore {pattern!r}"
                )
            made = quant.activations == "int8" if reader.activations == "int8" else quant.bits == reader.bits
            quant = replace(quant, activations="int8" if config.activate_quant and made else "float")
        decisions[found.path] = quant
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if part == reader.mark and path not in decisions and tensor.dtype not in FLOATS:
            raise UserError(
                "the checkpoint quantizes a module that is no linear layer of the model's graph",
                where=name,
                fix="config.json belongs to another model, or the module (experts, say) is of a kind not supported",
            )
    return decisions


def check_no_bias(tensor: FileTensor) -> None:
    """Old writers add zero biases to layers that have none; any other value would be lost."""
    if whole(tensor).astype(np.float32).any():
        raise UserError(
            "the checkpoint has a bias that the model's config does not announce",
            where=tensor.name,
            expected="no bias, or zeros",
            fix="config.json belongs to another model",
        )


def unpack(words: Array, bits: int) -> Array:
    """int32 [..., C] -> uint8 [..., C * 32 / bits]: the fields of each word from the lowest bits up."""
    data = np.ascontiguousarray(words).view(np.uint8)
    return data if bits == 8 else NIBBLES[data].view(np.uint8)


# byte -> its two nibbles, the low one first in memory
NIBBLES = (np.arange(256, dtype=np.uint16) & 0xF) | (np.arange(256, dtype=np.uint16) >> 4 << 8)


def words_for(count: int, bits: int) -> int:
    """How many int32 hold `count` fields."""
    return -(-count * bits // 32)


def checked_scales(tensor: FileTensor) -> Array:
    """A layer's scales in float32; zero, negative and non-finite ones are errors."""
    scale = convert(whole(tensor), FLOAT32)
    bad = np.argwhere(~(np.isfinite(scale) & (scale > 0)))
    if len(bad):
        raise UserError(
            "a scale is not a positive finite number",
            where=f"{tensor.name}{bad[0].tolist()}",
            found=str(scale[tuple(bad[0])]),
            fix="the checkpoint is damaged, or its writer met dead channels: quantize it again",
        )
    return scale


def ranges(count: int, width: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of `count` rows, about TILE_CODES elements each; every start is a multiple of `multiple`."""
    step = max(64, TILE_CODES // width) // multiple * multiple
    for start in range(0, count, step):
        yield start, min(start + step, count)


def check_central(zero: Array, bits: int, said: str, tensor: FileTensor, fix: str = "") -> Array:
    """`zero`, the zero points of a layer that its config calls symmetric, as `said`."""
    central = 1 << (bits - 1)
    if (zero != central).any():
        raise UserError(
            f"the config says {said}, but zero points differ from the centre",
            where=tensor.name,
            expected=str(central),
            found=str(sorted(set(zero[zero != central].tolist()))[:5]),
            fix=fix,
        )
    return zero


def input_order(g_idx: FileTensor, group: int) -> tuple[Order | None, tuple[int, ...]]:
    """(the order that puts each group's inputs together, the stored group in each place).

    Groups are placed by their first member, so that groups which are contiguous already need no order: None.
    """
    groups = whole(g_idx)
    count = len(groups) // group
    if groups.min() < 0 or groups.max() >= count or (np.bincount(groups, minlength=count) != group).any():
        raise UserError(
            "g_idx does not divide the inputs into equal groups",
            where=g_idx.name,
            expected=f"{count} groups, each {group} times",
            found=f"values {groups.min()} .. {groups.max()}",
            fix="group_size in the config belongs to another checkpoint, or the file is damaged",
        )
    _, first = np.unique(groups, return_index=True)
    places = np.argsort(first)
    rank = np.empty(count, np.int64)
    rank[places] = np.arange(count)
    indices = np.argsort(rank[groups], kind="stable")
    trivial = (indices == np.arange(len(indices))).all()
    return None if trivial else Order.of(indices), tuple(places.tolist())


def safe_pattern(text: str, where: str) -> re.Pattern[str]:
    """A regular expression from a file.

    Python's matcher takes exponential time on a quantified group, and a high power of the name's length on many
    quantifiers: such patterns are refused.
    """
    if len(text) > 1000 or re.search(r"\)[*+{]", text) or len(re.findall(r"[*+{]", text)) > 5:
        raise UserError(
            "a pattern too complex to match safely", where=where, expected="no (...)*, five of * + { at most"
        )
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError("not a regular expression", where=where, found=str(error)) from None
