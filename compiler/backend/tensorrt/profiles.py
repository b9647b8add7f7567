"""Optimization profiles: the ranges of shapes that an engine is built for, from three numbers a user can name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from instantrt.compiler.backend.tensorrt.build import Profile, Shape
from instantrt.passes.core.errors import UserError

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

SIZES = ("min", "opt", "max")
Range = tuple[int, int, int]


@dataclass(frozen=True)
class EngineLimits:
    """What an engine accepts: sequences together, tokens of one sequence with its past, the length it is tuned for."""

    max_batch: int = 1
    max_length: int = 2048
    opt_length: int = 512

    def __post_init__(self) -> None:
        for field, value, least in (("max_batch", self.max_batch, 1), ("max_length", self.max_length, 2)):
            if value < least:
                raise UserError(f"{field} is too small", expected=f"at least {least}", found=str(value))
        if not 1 <= self.opt_length <= self.max_length:
            raise UserError(
                "opt_length is outside of the profile",
                expected=f"1 to {self.max_length}, the longest that it takes",
                found=str(self.opt_length),
                fix="make --opt-length and --max-length agree",
            )


def profiles(inputs: Iterable[gs.Tensor], limits: EngineLimits, *, llm: bool) -> tuple[Profile, ...]:
    """Prefill and decode for a causal LM, one profile for any other model; inputs of fixed shape need none."""
    inputs = list(inputs)
    if not any(isinstance(size, str) for tensor in inputs for size in tensor.shape):
        return ()
    ranges = (prefill(limits), decode(limits)) if llm else (any_shape(inputs, limits),)
    return tuple({t.name: shape_range(t, each) for t in inputs} for each in ranges)


def prefill(limits: EngineLimits) -> Mapping[str, Range]:
    """Many tokens at once, on an empty cache or one filled before."""
    n, opt = limits.max_length, limits.opt_length
    return {"batch": (1, 1, limits.max_batch), "sequence": (1, opt, n), "past": (0, 0, n - 1), "total": (1, opt, n)}


def decode(limits: EngineLimits) -> Mapping[str, Range]:
    """One token of each sequence; of a single one, two: TensorRT expands int8 weights for a product of one row.

    docs/facts.md, "A profile with one row"
    """
    n, opt = limits.max_length, limits.opt_length
    past = n - 1
    return {
        "batch": (1, 1, limits.max_batch),
        "sequence": (1, 1, 2 if limits.max_batch == 1 else 1),
        "past": (1, min(opt, past), past),
        "total": (2, min(opt, past) + 1, past + 1),
    }


def any_shape(inputs: Iterable[gs.Tensor], limits: EngineLimits) -> Mapping[str, Range]:
    """A plain model: what is called batch is a batch, every other dynamic dimension a length."""
    names = {size for tensor in inputs for size in tensor.shape if isinstance(size, str)}
    batch = (1, 1, limits.max_batch)
    length = (1, limits.opt_length, limits.max_length)
    return {name: batch if "batch" in name.lower() else length for name in names}


def shape_range(tensor: gs.Tensor, ranges: Mapping[str, Range]) -> tuple[Shape, Shape, Shape]:
    unknown = [size for size in tensor.shape if isinstance(size, str) and size not in ranges]
    if unknown:
        raise UserError(
            "a size of an input has a name that says nothing of its range",
            where=tensor.name,
            expected=" or ".join(ranges),
            found=unknown[0],
            fix="give the inputs' sizes these names (onnx.tools.update_model_dims), or compile for a CPU",
        )

    def shape(i: int) -> Shape:
        return tuple(ranges[size][i] if isinstance(size, str) else int(size) for size in tensor.shape)

    return shape(0), shape(1), shape(2)


def trtexec_shapes(profile: Profile) -> list[str]:
    """--minShapes, --optShapes and --maxShapes of one profile."""
    flags = []
    for i, size in enumerate(SIZES):
        shapes = ",".join(f"{name}:{'x'.join(map(str, shape[i]))}" for name, shape in profile.items())
        flags.append(f"--{size}Shapes={shapes}")
    return flags
