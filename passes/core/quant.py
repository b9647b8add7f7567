"""Quantized weights in one normal form, and the arithmetic of DashInfer's InstantQuant.

A weight is W `[N, K]`, one row per output channel. A group is `group_size` consecutive k of one row; per-channel
is one group of K. Codes are unsigned (`uint8`, one a byte, 0 .. 2^bits - 1); `w = (code - zero) * scale`.
Signed int8 is the same codes less 128. Zero points are codes. One that is none is held as the minimum of its group,
-zero * scale: `w = code * scale + minimum`, which is exact for what files hold, and for groups of equal weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FLOAT32, Array, Source, Tile, convert

Activations = Literal["float", "int8"]
UINT8 = np.dtype(np.uint8)

# The last bit of a float of this size is 1: adding it rounds what is below 2^22 to an integer, half to even, which the
# low bits then are.
ROUND = np.float32(3 << 22)


class Codes(NamedTuple):
    """One block of a quantized weight.

    codes  [n, K]  uint8    0 .. 2^bits - 1
    scale  [n, G]  float32  positive, representable in the type it will be stored in
    zero   [n, G]  uint8    0 .. 2^bits - 1; or the minimum, float32, representable in the type it will be stored in
    """

    codes: Array
    scale: Array
    zero: Array


def scales_of(tile: Tile) -> Array:
    """The second part of `Codes`, as it is; the codes are a view's first."""
    return tile.parts[1]


def zeros_of(tile: Tile) -> Array:
    """The third."""
    return tile.parts[2]


@dataclass(frozen=True)
class Order:
    """A permutation of channels, by value: channel j of what follows is channel `indices[j]` of what was."""

    data: bytes  # int32; bytes hash once

    @classmethod
    def of(cls, indices: Array) -> Order:
        return cls(indices.astype(np.int32).tobytes())

    @property
    def indices(self) -> Array:
        return np.frombuffer(self.data, np.int32)

    def __len__(self) -> int:
        return len(self.data) // 4


@dataclass(frozen=True)
class QuantTensor:
    """A quantized weight `[N, K]` that is computed or decoded tile by tile.

    `source` delivers `Codes`. `symmetric` promises that every zero point is the central code 2^(bits-1).
    `zero_dtype` is uint8 where zero points are codes, else the float type that holds the minima exactly.
    `code_bits` are those that codes with minima are in, where fewer than `bits`: products take them about their middle.
    `activations` says what the linear multiplies it with: float, or int8 quantized per token.
    `correction` is what the bias behind it gains, [N] float32 as bytes, which hash once; none where empty.
    `order` is the order its inputs have to be brought into, None for the model's own (GPTQ's desc_act sorts them).
    """

    name: str
    source: Source
    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: np.dtype[Any]
    activations: Activations = "float"
    order: Order | None = None
    zero_dtype: np.dtype[Any] = UINT8
    code_bits: int = 0
    correction: bytes = b""

    def __post_init__(self) -> None:
        assert self.bits in (4, 8)
        assert not self.code_bits or self.has_minima
        assert self.shape[1] % self.group_size == 0
        assert not (self.symmetric and self.has_minima)

    @property
    def groups(self) -> int:
        return self.shape[1] // self.group_size

    @property
    def per_channel(self) -> bool:
        return self.groups == 1

    @property
    def has_minima(self) -> bool:
        return self.zero_dtype != UINT8

    @property
    def central(self) -> int:
        """The zero point of a symmetric weight; with minima, the code that products are taken about.

        Far from the codes that there are, what a product gives and what its offset takes back would be large and alike.
        """
        return 1 << ((self.code_bits or self.bits) - 1)

    @property
    def mode(self) -> str:
        """The field's name for it: A16W8, A16W4 or A8W8."""
        return f"A{'8' if self.activations == 'int8' else '16'}W{self.bits}"

    def __str__(self) -> str:
        grain = "per-channel" if self.per_channel else f"group {self.group_size}"
        return f"{self.mode} {grain} {self.zeros}"

    @property
    def zeros(self) -> str:
        """What its zero points are, in words."""
        return "symmetric" if self.symmetric else "asymmetric" + ", with minima" * self.has_minima

    def tiles(self) -> Iterator[Tile]:
        return self.source.tiles()


@runtime_checkable
class StoredInCodes(Protocol):
    """A source of float rows that a checkpoint may hold in codes."""

    def quantized(self, name: str) -> QuantTensor | None:
        """The matrix with its codes, under this name; None where it has none."""
        ...


def quantize_asymmetric(w: Array, bits: int, scale_dtype: np.dtype[Any]) -> Codes:
    """InstantQuant weight-only. w `[n, G, g]` of any float type, contiguous.

    fmin' = min(fmin, 0), fmax' = max(fmax, 0), scale = (fmax' - fmin') / (2^bits - 1),
    zero = clamp(round(-fmin' / scale)), code = clamp(round(w / scale) + zero). With 0 inside the range a one-sided or
    constant group stays exact to one step, and the zero point is an integer of the code's own type.
    Rounding is half to even; scale is rounded to `scale_dtype` before it is used.
    """
    top = np.float32(2**bits - 1)
    low, high = extremes(w)
    scale = stored((high - low) / top, scale_dtype)
    below = np.rint(-low / scale)
    zero = np.minimum(below, top)
    steps = in_steps(w, scale)
    steps += ROUND
    # Codes have to be clamped where both ends of a group lie at a tie, or where the scale was rounded down.
    if ((below > top) | (np.rint(high / scale) + zero > top)).any():
        steps += zero[..., None]
        np.clip(steps, ROUND, ROUND + top, out=steps)
        codes = low_bytes(steps)
    else:
        codes = low_bytes(steps)
        codes += zero.astype(np.uint8)[..., None]
    return Codes(codes.reshape(len(w), -1), scale, zero.astype(np.uint8))


def quantize_unrounded(w: Array, bits: int, scale_dtype: np.dtype[Any], zero_dtype: np.dtype[Any]) -> Codes:
    """The same with a zero point that is no code: minimum = fmin', code = clamp(round((w - minimum) / scale)).

    Both ends of the range are then codes exactly, but 0 is none. The minimum is rounded to `zero_dtype` before it is
    used.
    """
    top = np.float32(2**bits - 1)
    low, high = extremes(w)
    scale = stored((high - low) / top, scale_dtype)
    minimum = low.astype(zero_dtype).astype(np.float32)
    wide = convert(w, FLOAT32)
    steps = np.subtract(wide, minimum[..., None], out=None if wide is w else wide)
    steps /= scale[..., None]
    np.clip(steps, 0, top, out=steps)
    steps += ROUND
    return Codes(low_bytes(steps).reshape(len(w), -1), scale, minimum)


def quantize_symmetric(w: Array, bits: int, scale_dtype: np.dtype[Any]) -> Codes:
    """InstantQuant activation quantization's weights: scale = max|w| / (2^(bits-1) - 1), which no code exceeds.

    w `[n, G, g]` of any float type, contiguous.
    """
    top = 2 ** (bits - 1) - 1
    low, high = extremes(w)
    scale = stored(np.maximum(high, -low) / np.float32(top), scale_dtype)
    steps = in_steps(w, scale)
    steps += ROUND
    codes = low_bytes(steps)
    codes += np.uint8(top + 1)
    return Codes(codes.reshape(len(w), -1), scale, np.full(scale.shape, top + 1, np.uint8))


def extremes(w: Array) -> tuple[Array, Array]:
    """min(fmin, 0) and max(fmax, 0) of each group of w `[n, G, g]`: float32 `[n, G]`, NaN where one is in the group.

    The bits are compared, which for 16-bit types halves the work: as signed integers the positive floats are in order
    and above the rest, as unsigned ones the negative floats are, by magnitude. NaN is beyond infinity in both.
    """
    size = w.itemsize
    high = np.maximum(reduce_groups(np.maximum, w.view(f"i{size}")), 0)
    low = np.maximum(reduce_groups(np.maximum, w.view(f"u{size}")), 1 << 8 * size - 1)
    return convert(low.view(w.dtype), FLOAT32), convert(high.view(w.dtype), FLOAT32)


def in_steps(w: Array, scale: Array) -> Array:
    """w / scale of each group, in float32 that nobody else has: `[n, G, g]`."""
    wide = convert(w, FLOAT32)
    return np.asarray(np.divide(wide, scale[..., None], out=None if wide is w else wide))


def low_bytes(steps: Array) -> Array:
    """What integers to which ROUND was added are modulo 256, as uint8."""
    return steps.view(np.uint32).astype(np.uint8)


def reduce_groups(op: np.ufunc, w: Array) -> Array:
    """`op` (minimum or maximum) over the last axis of w `[n, G, g]`, contiguous.

    Short groups by a few long operations, since NumPy's loops over short ones cost more than what is in them: each
    combines every element with the one half a group, a quarter, ... behind it. Only a group's first is of use then.
    """
    n, groups, size = w.shape
    flat = w.reshape(-1)
    if size > 64 or size & (size - 1):
        return op.reduceat(flat, np.arange(0, len(flat), size)).reshape(n, groups)
    left, step = size, size  # elements of a group that are of use, and from one group to the next
    while left > 1:
        if left * w.itemsize == 8 and step > left:  # one word: few of them are left
            flat, step = flat.view(np.uint64)[:: step // left].copy().view(w.dtype), left
        left //= 2
        flat = op(flat[:-left], flat[left:])
    return flat[::step].reshape(n, groups)


def stored(scale: Array, dtype: np.dtype[Any]) -> Array:
    """The scale as it will be read back: rounded to `dtype`, 1 for an all-zero group, never subnormal.

    NaN and infinity stay: the caller knows which tensor to name.
    """
    tiny = np.float32(np.finfo(np.float16).tiny if dtype == np.float16 else np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):
        rounded = np.maximum(scale, tiny).astype(dtype).astype(np.float32)
    return np.where(scale == 0, np.float32(1), rounded)


def in_pairs(codes: Array) -> Array:
    """Four-bit codes `[..., 2 * n]`, contiguous, two a byte, the first in the low nibble: `[..., n]`."""
    pairs = codes.view("<u2")  # odd code << 8 | even code
    packed: Array = (pairs | pairs >> 4).astype(np.uint8)
    return packed


def dequantize(block: Codes, group_size: int) -> Array:
    """`(code - zero) * scale`, or `code * scale + minimum`, in float32: `[n, K]`."""
    n, k = block.codes.shape
    q = block.codes.reshape(n, k // group_size, group_size).astype(np.float32)
    if block.zero.dtype == UINT8:
        q -= block.zero[..., None]
    q *= block.scale[..., None]
    if block.zero.dtype != UINT8:
        q += block.zero[..., None]
    return q.reshape(n, k)


def offsets(block: Codes, central: int) -> Array:
    """What a weight is above `(code - central) * scale`: constant within a group, float32 `[n, G]`."""
    if block.zero.dtype == UINT8:
        return (np.float32(central) - block.zero) * block.scale
    return block.zero + np.float32(central) * block.scale


@dataclass(frozen=True)
class Quantizer(ABC):
    """Quantizes the rows of a float weight as they stream by; no calibration data."""

    name: str
    weight: Source
    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: np.dtype[Any]
    zero_dtype: np.dtype[Any] = field(default=UINT8, kw_only=True)

    @abstractmethod
    def tiles(self) -> Iterator[Tile]:
        """The codes of some rows at a time."""


class InstantQuant(Quantizer):
    """By the formula alone."""

    def tiles(self) -> Iterator[Tile]:
        tiles = ((start, rows) for start, (rows,) in self.weight.tiles())
        return checked_tiles(self, tiles, lambda start, w: self.quantize(w))

    def quantize(self, w: Array) -> Codes:
        """w `[n, G, g]`."""
        if self.symmetric:
            return quantize_symmetric(w, self.bits, self.scale_dtype)
        if self.zero_dtype != UINT8:
            return quantize_unrounded(w, self.bits, self.scale_dtype, self.zero_dtype)
        return quantize_asymmetric(w, self.bits, self.scale_dtype)


def checked_tiles(
    quantizer: Quantizer, chunks: Iterable[tuple[int, Array]], quantize: Callable[[int, Array], Codes]
) -> Iterator[Tile]:
    """The codes that `quantize` makes of (the first row, rows `[n, G, g]`); UserError where a scale is not finite.

    chunks   (the first row, rows [n, K] of any float type), some at a time
    """
    for start, rows in chunks:
        with np.errstate(invalid="ignore", over="ignore"):
            block = quantize(start, rows.reshape(len(rows), -1, quantizer.group_size))
        if not np.isfinite(block.scale).all():
            raise not_finite(quantizer.name, start, convert(rows, FLOAT32))
        yield Tile(start, block)


def not_finite(name: str, start: int, flat: Array) -> UserError:
    """What is wrong with the rows `flat` [n, K] that gave a scale that is not finite."""
    bad = np.argwhere(~np.isfinite(flat))
    if len(bad):
        row, column = bad[0]
        return UserError(
            "the weight is not finite",
            where=f"{name}[{start + row}, {column}]",
            expected="finite numbers",
            found=str(flat[row, column]),
            fix="repair the checkpoint, or leave this layer float with --ignore",
        )
    row = int(np.abs(flat).max(axis=1).argmax())
    return UserError(
        "the weight is too large for its scale",
        where=f"{name}[{start + row}]",
        expected="a scale that fits float16 (at most 65504)",
        found=f"max|w| = {np.abs(flat[row]).max():g}",
        fix="leave this layer float with --ignore",
    )
