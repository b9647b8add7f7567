"""What an operation is, written once: ports with symbolic shapes, attributes, legal types, reference, tolerance.

The pass that builds the node, the CPU evaluation, the tests and the generated C++ header all read the same `Op`.

A shape is a tuple of terms. A name ("N", or a multiple of it, "2*N") is a symbol, bound by the first tensor that has
it; anything else ("K//group") is an expression over symbols and attributes, checked once they are known. A leading
"..." stands for any number of axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class DType(Enum):
    """Element types by the name NumPy gives them; the second member is TensorRT's `DataType` enumerator."""

    F32 = ("float32", "kFLOAT")
    F16 = ("float16", "kHALF")
    BF16 = ("bfloat16", "kBF16")
    I8 = ("int8", "kINT8")
    U8 = ("uint8", "kUINT8")
    I32 = ("int32", "kINT32")
    I64 = ("int64", "kINT64")
    BOOL = ("bool", "kBOOL")

    @property
    def tensorrt_name(self) -> str:
        return self.value[1]


@dataclass(frozen=True)
class Port:
    name: str
    shape: tuple[str, ...]
    optional: bool = False  # optional ports come last


@dataclass(frozen=True)
class Attr:
    """A 32-bit integer attribute. `allowed` is the whole legal set, or None where `Op.check` decides."""

    name: str
    default: int
    allowed: tuple[int, ...] | None = None


def bits_of(number: float) -> int:
    """float32's bits, as an attribute."""
    return int(np.float32(number).view(np.int32))


@dataclass(frozen=True)
class Tolerance:
    """|y - exact| <= frobenius * |exact| over all, and <= element * |exact| + 2^-20 * sum|x||w| for each element."""

    frobenius: float
    element: float


LABELS = ("plugin_version", "plugin_namespace")  # on a node for TensorRT's parser; no attributes of the operation


class ShapeError(ValueError):
    """A tensor or attribute that the operation refuses; the message says where, what was expected, what was found."""


@dataclass(frozen=True)
class Op:
    name: str
    version: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attrs: tuple[Attr, ...]
    types: tuple[tuple[DType, ...], ...]  # legal rows: one type for each input, then for each output
    reference: Callable[..., tuple[Array, ...]]
    tolerance: Mapping[DType, Tolerance]
    check: Callable[[Mapping[str, int]], str | None]  # cross-checks of sizes and attributes: what is wrong, or None

    def bind(self, shapes: Sequence[Sequence[int] | None], attrs: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
        """Check input shapes and attributes against the definition; return the output shapes."""
        env = self.attributes(attrs)
        if not len([p for p in self.inputs if not p.optional]) <= len(shapes) <= len(self.inputs):
            raise ShapeError(
                f"{self.name}: expected {len(self.inputs)} inputs (trailing optional), found {len(shapes)}"
            )
        leading: tuple[int, ...] = ()
        present = [(port, tuple(shape)) for port, shape in zip(self.inputs, shapes, strict=False) if shape is not None]
        for port, shape in present:
            terms = tuple(t for t in port.shape if t != "...")
            extra = len(shape) - len(terms)
            if extra < 0 or (extra and terms == port.shape):
                raise ShapeError(f"{self.name}: '{port.name}' has {len(shape)} axes, expected {port.shape}")
            leading = leading or shape[:extra]
            for term, size in zip(terms, shape[extra:], strict=True):
                factor, _, symbol = term.rpartition("*")
                if symbol.isidentifier() and (factor == "" or factor.isdigit()):
                    env.setdefault(symbol, size // int(factor or 1))
        if wrong := self.check(env):
            raise ShapeError(f"{self.name}: {wrong}")
        for port, shape in present:
            terms = tuple(t for t in port.shape if t != "...")
            self._compare(port, terms, shape[len(shape) - len(terms) :], env)
        return tuple(
            (leading if port.shape[0] == "..." else ()) + tuple(_term(t, env) for t in port.shape if t != "...")
            for port in self.outputs
        )

    def attributes(self, given: Mapping[str, Any]) -> dict[str, int]:
        """All attributes with their defaults; refuses unknown names and values."""
        if unknown := set(given) - {a.name for a in self.attrs} - set(LABELS):
            raise ShapeError(
                f"{self.name}: unknown attributes {sorted(unknown)}; it has {[a.name for a in self.attrs]}"
            )
        values = {a.name: int(given.get(a.name, a.default)) for a in self.attrs}
        for attr in self.attrs:
            if attr.allowed is not None and values[attr.name] not in attr.allowed:
                raise ShapeError(f"{self.name}: {attr.name} is {values[attr.name]}, expected one of {attr.allowed}")
        return values

    def _compare(self, port: Port, terms: Sequence[str], shape: Sequence[int], env: Mapping[str, int]) -> None:
        for axis, (term, size) in enumerate(zip(terms, shape, strict=True)):
            if size != (expected := _term(term, env)):
                known = ", ".join(f"{k}={v}" for k, v in env.items())
                raise ShapeError(
                    f"{self.name}: '{port.name}' axis {axis} is {size}, expected {term} = {expected} (with {known})"
                )


def _term(term: str, env: Mapping[str, int]) -> int:
    # terms are literals of the op definitions, never input
    return int(eval(term, {"__builtins__": {"max": max}}, dict(env)))
