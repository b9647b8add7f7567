"""GGUF's blocks, bit for bit: codes, scales and minima are taken as they are, never dequantized.

A row of a matrix [N, K] is K / 32 or K / 256 blocks, each with its scales and its codes of 2 to 8 bits. In the normal
form all are codes of 4 or 8 bits, where `code * scale + minimum` and `(code - zero) * scale` are in float32 what the
`gguf` package's dequantization gives. The layouts are those of its quants.py.

            codes   groups   zero                              scale and minimum
Q8_0        8       32       128                               float16
Q5_0        8       32       128                               float16
IQ4_NL      8       32       128: its 16 levels are integers   float16
Q4_0        4       32       8; 7 where the scale is negative  float16
Q4_1, Q5_1  4, 8    32       a minimum                         float16
Q4_K, Q5_K  4, 8    32       a minimum                         float16 * 6 bits
Q2_K        4       16       a minimum                         float16 * 4 bits
Q3_K        4       16       8                                 float16 * 6 bits
Q6_K        8       16       128                               float16 * 8 bits
IQ4_XS      8       32       128                               float16 * 6 bits

Scales are positive: a negative one turns the codes of its group around.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from instantrt.compiler.quant.stored import LEFT_FLOAT, Reader, StoredLayer
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import BFLOAT16, FLOAT32, TILE_BYTES, Array, FileTensor, Tile, convert, read_exactly
from instantrt.passes.core.quant import UINT8, Codes, QuantTensor, dequantize
from instantrt.passes.core.rewrite import Reject

FLOAT16 = np.dtype(np.float16)
FLOAT_KINDS = {"F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16}
Parts = tuple[Array, Array, Array | None]  # codes uint8 [n, b, ...], scale float32 [n, b, groups], minimum or None


@dataclass(frozen=True)
class Kind:
    """How the blocks of a type are read.

    parts   blocks uint8 [n, b, bytes] -> Parts; codes less `zero` are what scales multiply where there is no minimum
    bits    of the codes in the normal form
    exact   the type that holds its scales, and its minima, exactly
    used    bits of the codes, where they are fewer
    full    all codes of its bits are in use: where zero is the central one, the lowest has no opposite
    """

    parts: Callable[[Array], Parts]
    bits: int
    group_size: int
    zero: int | None
    exact: np.dtype[Any]
    used: int = 0
    full: bool = False

    @property
    def symmetric(self) -> bool:
        return self.zero is not None and not self.full


def float16s(blocks: Array, start: int, count: int = 1) -> Array:
    """float16 numbers from byte `start` of each block: float32 [n, b, count]."""
    return np.ascontiguousarray(blocks[..., start : start + 2 * count]).view("<f2").astype(np.float32)


def fields(packed: Array, bits: int, width: int) -> Array:
    """uint8 [n, b, bytes] -> [n, b, bytes / width, 8 / bits, width]: of `width` bytes the lowest bits first."""
    n, b, size = packed.shape
    out = np.empty((n, b, size // width, 8 // bits, width), np.uint8)
    source = packed.reshape(n, b, size // width, width)
    for place in range(8 // bits):
        np.right_shift(source, bits * place, out=out[..., place, :])
    out &= (1 << bits) - 1
    return out


def q8_0(blocks: Array) -> Parts:
    return blocks[..., 2:] ^ np.uint8(0x80), float16s(blocks, 0), None


def q4_0(blocks: Array) -> Parts:
    return fields(blocks[..., 2:], 4, 16), float16s(blocks, 0), None


def q4_1(blocks: Array) -> Parts:
    affine = float16s(blocks, 0, 2)
    return fields(blocks[..., 4:], 4, 16), affine[..., :1], affine[..., 1:]


def five(low: Array, high: Array) -> Array:
    """Codes of 5 bits: 16 bytes of the lower four, and a word of the fifth. uint8 [n, b, 32]."""
    codes = fields(low, 4, 16).reshape(*low.shape[:-1], 32)
    codes |= np.unpackbits(np.ascontiguousarray(high), axis=-1, bitorder="little") << 4
    return codes


def q5_0(blocks: Array) -> Parts:
    return five(blocks[..., 6:], blocks[..., 2:6]) + np.uint8(128 - 16), float16s(blocks, 0), None


def q5_1(blocks: Array) -> Parts:
    affine = float16s(blocks, 0, 2)
    return five(blocks[..., 8:], blocks[..., 4:8]), affine[..., :1], affine[..., 1:]


def levels(indices: Array) -> Array:
    """The 16 levels of IQ4 as codes about 128."""
    from gguf.quants import IQ4_NL

    return (np.array(IQ4_NL.kvalues) + 128).astype(np.uint8)[indices]


def iq4_nl(blocks: Array) -> Parts:
    return levels(fields(blocks[..., 2:], 4, 16)), float16s(blocks, 0), None


def iq4_xs(blocks: Array) -> Parts:
    low = fields(blocks[..., 4:8], 4, 1).reshape(*blocks.shape[:-1], 8)
    high = fields(blocks[..., 2:4], 2, 1).reshape(*blocks.shape[:-1], 8)
    scale = float16s(blocks, 0) * ((low | high << 4).astype(np.float32) - 32)
    return levels(fields(blocks[..., 8:], 4, 16)), scale, None


def scales_and_minima(blocks: Array) -> tuple[Array, Array]:
    """Of Q4_K and Q5_K: d * sc and -dmin * m, float32 [n, b, 8]."""
    from gguf.quants import Q4_K

    n, b, _ = blocks.shape
    affine = float16s(blocks, 0, 2)
    factors = Q4_K.get_scale_min(np.ascontiguousarray(blocks[..., 4:16]).reshape(n * b, 12))
    scale, minimum = (f.reshape(n, b, 8).astype(np.float32) for f in factors)
    return affine[..., :1] * scale, affine[..., 1:] * -minimum


def q4_k(blocks: Array) -> Parts:
    return fields(blocks[..., 16:], 4, 32), *scales_and_minima(blocks)


def q5_k(blocks: Array) -> Parts:
    codes = fields(blocks[..., 48:], 4, 32).reshape(*blocks.shape[:-1], 8, 32)
    codes |= fields(blocks[..., 16:48], 1, 32)[..., 0, :, :] << 4
    return codes, *scales_and_minima(blocks)


def q6_k(blocks: Array) -> Parts:
    low = fields(blocks[..., :128], 4, 64).reshape(*blocks.shape[:-1], 256)
    high = fields(blocks[..., 128:192], 2, 32).reshape(*blocks.shape[:-1], 256)
    scale = float16s(blocks, 208) * blocks[..., 192:208].view(np.int8).astype(np.float32)
    return (low | high << 4) + np.uint8(128 - 32), scale, None


def q2_k(blocks: Array) -> Parts:
    affine = float16s(blocks, 80, 2)
    scale, minimum = (blocks[..., :16] & 15).astype(np.float32), (blocks[..., :16] >> 4).astype(np.float32)
    return fields(blocks[..., 16:80], 2, 32), affine[..., :1] * scale, affine[..., 1:] * -minimum


def q3_k(blocks: Array) -> Parts:
    shape = (*blocks.shape[:-1], 256)
    low, high = fields(blocks[..., 32:96], 2, 32).reshape(shape), fields(blocks[..., :32], 1, 32).reshape(shape)
    scales = fields(blocks[..., 96:104], 4, 8).reshape(*shape[:-1], 16)
    scales |= fields(blocks[..., 104:108], 2, 4).reshape(*shape[:-1], 16) << 4
    return (low | high << 2) + np.uint8(8 - 4), float16s(blocks, 108) * (scales.astype(np.float32) - 32), None


KINDS: Mapping[str, Kind] = {
    "Q8_0": Kind(q8_0, 8, 32, 128, FLOAT16),
    "Q5_0": Kind(q5_0, 8, 32, 128, FLOAT16),
    "IQ4_NL": Kind(iq4_nl, 8, 32, 128, FLOAT16),
    "Q4_0": Kind(q4_0, 4, 32, 8, FLOAT16, full=True),
    "Q4_1": Kind(q4_1, 4, 32, None, FLOAT16),
    "Q5_1": Kind(q5_1, 8, 32, None, FLOAT16, used=5),
    "Q4_K": Kind(q4_k, 4, 32, None, FLOAT32),
    "Q5_K": Kind(q5_k, 8, 32, None, FLOAT32, used=5),
    "Q2_K": Kind(q2_k, 4, 16, None, FLOAT32, used=2),
    "Q3_K": Kind(q3_k, 4, 16, 8, FLOAT32),
    "Q6_K": Kind(q6_k, 8, 16, 128, FLOAT32),
    "IQ4_XS": Kind(iq4_xs, 8, 32, 128, FLOAT32),
}


@dataclass(frozen=True)
class GgufTensor(FileTensor):
    """A tensor of a GGUF file as the model has it: float32, dequantized as it is read.

    kind    its type in the file
    block   (weights, bytes) of one of its blocks
    heads   into which its rows are divided, each of which holds the two halves of a rotation row by row in turn, as
            llama.cpp's converter leaves them; here they are one after the other. 0 where rows are as they were
    less    what the converter added to it
    floats  its codes are not kept: it is what it is dequantized to
    """

    kind: str = "F32"
    block: tuple[int, int] = (1, 4)
    heads: int = 0
    less: float = 0.0
    floats: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.kind not in FLOAT_KINDS and not self.floats

    def raw(self) -> Iterator[tuple[int, Array]]:
        """(the first row, blocks uint8 [rows, blocks, bytes]), some rows of the model's at a time."""
        weights, size = self.block
        rows, width = self.shape[0], math.prod(self.shape[1:]) // weights
        unit = rows // self.heads if self.heads else 1
        step = unit * max(1, TILE_BYTES // (unit * math.prod(self.shape[1:])))  # a code is a byte in the tile
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, rows, step):
                count = min(step, rows - start)
                at = self.offset + start * width * size
                blocks = read_exactly(file.fileno(), at, count * width * size, self).reshape(count, width, size)
                if self.heads:
                    blocks = blocks.reshape(-1, unit // 2, 2, width, size).swapaxes(1, 2).reshape(count, width, size)
                yield start, blocks

    def tiles(self) -> Iterator[Tile]:
        """Rows in float32; of a type without codes here, as the `gguf` package dequantizes it."""
        if self.kind in KINDS:
            group = KINDS[self.kind].group_size
            for start, block in GgufRows(self).tiles():
                yield Tile(start, (dequantize(Codes(*block), group),))
            return
        for start, blocks in self.raw():
            flat = blocks.reshape(len(blocks), -1)
            yield Tile(start, ((self.numbers(flat) - np.float32(self.less)).reshape(-1, *self.shape[1:]),))

    def numbers(self, rows: Array) -> Array:
        if self.kind in FLOAT_KINDS:
            return convert(np.ascontiguousarray(rows).view(FLOAT_KINDS[self.kind]), FLOAT32)
        from gguf import GGMLQuantizationType
        from gguf import dequantize as floats_of

        found: Array = floats_of(rows, GGMLQuantizationType[self.kind])
        return found

    def check_readable(self) -> None:
        """Refuses a type that the `gguf` package gives no numbers of."""
        try:
            self.numbers(np.zeros((1, self.block[1]), np.uint8))
        except NotImplementedError:
            raise UserError(
                f"nobody here reads tensors of type {self.kind}",
                where=f"{self.path}, {self.name}",
                expected=", ".join((*FLOAT_KINDS, *KINDS)),
                found=self.kind,
                fix="convert the model again, to one of these types",
            ) from None

    def quantized(self, name: str) -> QuantTensor | None:
        """The matrix with its codes, under the name of a layer; None where its type has none."""
        kind = KINDS.get(self.kind)
        if kind is None or self.floats or len(self.shape) != 2:
            return None
        n, k = self.shape
        minima = kind.exact if kind.zero is None else UINT8
        sizes = (n, k), kind.bits, kind.group_size, kind.symmetric
        return QuantTensor(name, GgufRows(self), *sizes, kind.exact, zero_dtype=minima, code_bits=kind.used)


@dataclass(frozen=True)
class GgufRows:
    """The codes of a GGUF tensor."""

    weight: GgufTensor

    def tiles(self) -> Iterator[Tile]:
        kind = KINDS[self.weight.kind]
        for start, blocks in self.weight.raw():
            codes, scale, minimum = kind.parts(blocks)
            n = len(blocks)
            codes = codes.reshape(n, -1, kind.group_size)
            scale = scale.reshape(n, -1)
            third = np.full(scale.shape, kind.zero, np.uint8) if minimum is None else minimum.reshape(n, -1)
            self.check(start, scale, third)
            if not (scale > 0).all():
                if minimum is None:
                    self.turn(start, codes, scale, third, kind)
                codes[scale == 0] = third[scale == 0][:, None] if minimum is None else 0  # all of its weights are equal
                scale[scale == 0] = 1
            yield Tile(start, Codes(codes.reshape(n, -1), scale, third))

    def turn(self, start: int, codes: Array, scale: Array, zero: Array, kind: Kind) -> None:
        """Makes negative scales positive. Four bits have no room for the code beyond 15: there the zero moves, too."""
        below = scale < 0
        if kind.full:
            codes[below] = 15 - codes[below]
            zero[below] = 7
        else:
            turned = codes[below]
            if not turned.all():
                raise UserError(
                    "a block with a negative scale holds the lowest code, whose opposite is no code",
                    where=self.where(start + int(np.nonzero(below)[0][0])),
                    fix="--requantize takes it dequantized",
                )
            codes[below] = np.uint8((1 << kind.bits) % 256) - turned
        np.abs(scale, out=scale)

    def check(self, start: int, scale: Array, third: Array) -> None:
        """Refuses numbers that are none, and negative scales where a minimum leaves no way to turn them around."""
        bad = ~np.isfinite(scale)
        if third.dtype != UINT8:
            bad |= ~np.isfinite(third) | (scale < 0)
        if bad.any():
            row, group = np.argwhere(bad)[0]
            raise UserError(
                "a scale or a minimum that cannot be right",
                where=self.where(start + int(row)),
                expected="finite numbers" + (", a scale not below 0" if third.dtype != UINT8 else ""),
                found=f"scale {scale[row, group]}, {'minimum' if third.dtype != UINT8 else 'zero'} {third[row, group]}",
                fix="the file is damaged: copy it again, or quantize the model again",
            )

    def where(self, row: int) -> str:
        return f"{self.weight.path}, {self.weight.name}, row {row} of the model's"


@dataclass(frozen=True)
class GgufReader(Reader):
    """The quantization of a file whose matrices are of several types; `bits` and `group_size` are of most weights."""

    bits: int
    group_size: int
    notes: tuple[str, ...] = ()

    method = "gguf"
    mark = "weight"
    activations = "float"

    def read(self, layer: StoredLayer) -> QuantTensor | Reject:
        tensor = layer.find("weight")
        if not isinstance(tensor, GgufTensor) or not tensor.is_quantized:
            return LEFT_FLOAT
        if tensor.shape != layer.shape:  # told with the other parameters
            return LEFT_FLOAT
        quant = tensor.quantized(layer.path)
        if quant is None:
            raise UserError(
                f"{tensor.kind} has no codes of equal steps",
                where=f"{tensor.path}, {tensor.name}",
                expected=", ".join(KINDS),
                found=tensor.kind,
                fix="--requantize takes it dequantized, with --quant or as floats",
            )
        return quant


def detect(tensors: Mapping[str, FileTensor]) -> GgufReader | None:
    """The reader of a checkpoint that is a GGUF file with quantized matrices."""
    sizes = Counter[str]()
    for tensor in dict.fromkeys(tensors.values()):  # a tied head is its table
        if isinstance(tensor, GgufTensor) and tensor.is_quantized:
            sizes[tensor.kind] += math.prod(tensor.shape)
    if not sizes:
        return None
    shares = ", ".join(f"{kind} {count / sum(sizes.values()):.0%}" for kind, count in sizes.most_common())
    main = next((KINDS[kind] for kind, _ in sizes.most_common() if kind in KINDS), KINDS["Q8_0"])
    return GgufReader(main.bits, main.group_size, (f"quantized weights of the file: {shares}",))
