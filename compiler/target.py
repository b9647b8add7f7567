"""What can be compiled for: one row a target."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from packaging.specifiers import SpecifierSet

from instantrt.passes.core.errors import UserError

# The first TensorRT that parses all of Attention, RMSNormalization, RotaryEmbedding and TensorScatter (docs/facts.md,
# "First releases of operators").
WHOLE = "10.15"


CPU_PLUGIN = "libinstantrt_cpu.so"


class Backend(Enum):
    """Who runs the artifact."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"


@dataclass(frozen=True)
class Target:
    """One deployment target.

    sm            compute capability times ten, None for a CPU
    int8_mma      has int8 tensor cores (or integer dot products): A8W8 makes sense
    bf16          computes in bfloat16; where not, a bfloat16 checkpoint runs in float16
    tensorrt      releases of full TensorRT that build for it, as a version specifier; "" for none
    rtx           TensorRT-RTX builds for it, on any machine, and loads there (docs/facts.md, "SMs of TensorRT-RTX")
    saturates     its products of 8 bits by signed 8 bits may overflow (docs/facts.md, "Saturation without VNNI")
    """

    name: str
    family: str
    backend: Backend
    sm: int | None = None
    int8_mma: bool = True
    bf16: bool = True
    tensorrt: str = ""
    rtx: bool = False
    saturates: bool = False
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        gpu = self.backend is Backend.TENSORRT
        assert gpu == (self.sm is not None) == bool(self.tensorrt), self
        assert not self.rtx or gpu, self
        assert self.sm is None or (self.bf16 == (self.sm >= 80) and self.int8_mma == (self.sm >= 75)), self

    @property
    def plugin(self) -> str:
        """The file of our plugin library for it; "" where there is none.

        Volta has its own: today's compilers do not generate its code.
        """
        if self.sm is None:
            return CPU_PLUGIN if self.name.startswith("x86") else ""
        return "libinstantrt_plugins_sm70.so" if self.sm == 70 else "libinstantrt_plugins.so"

    @property
    def wide_int8(self) -> bool:
        """It has products of int8 that are written as float32 (docs/facts.md, "Turing")."""
        return self.sm is not None and self.sm >= 80

    @property
    def whole_operators(self) -> bool:
        """Its TensorRT parses the operators of opset 23 and 24 that our graphs have."""
        return SpecifierSet(self.tensorrt).contains(WHOLE)


_CPU, _GPU = Backend.ONNXRUNTIME, Backend.TENSORRT
TARGETS = (
    Target("sm70", "Volta", _GPU, 70, int8_mma=False, bf16=False, tensorrt=">=10.0,<10.5", aliases=("v100",)),
    Target("sm75", "Turing", _GPU, 75, bf16=False, tensorrt=">=10.15", rtx=True, aliases=("t4", "rtx2080ti")),
    Target("sm80", "Ampere", _GPU, 80, tensorrt=">=10.15", rtx=True, aliases=("a100", "a30")),
    Target("sm86", "Ampere", _GPU, 86, tensorrt=">=10.15", rtx=True, aliases=("a10", "a40", "rtx3090")),
    Target("sm89", "Ada", _GPU, 89, tensorrt=">=10.15", rtx=True, aliases=("l4", "l40s", "rtx4090")),
    Target("sm90", "Hopper", _GPU, 90, tensorrt=">=10.15", aliases=("h100", "h200")),
    Target("sm100", "Blackwell", _GPU, 100, tensorrt=">=10.15", aliases=("b100", "b200")),
    Target("sm120", "Blackwell", _GPU, 120, tensorrt=">=10.15", rtx=True, aliases=("rtx5090",)),
    Target("sm121", "Blackwell", _GPU, 121, tensorrt=">=10.15", rtx=True, aliases=("gb10",)),
    Target("x86", "x86-64, VNNI", _CPU, aliases=("x86_64", "cpu")),
    Target("x86-avx2", "x86-64, AVX2", _CPU, saturates=True),
    Target("armv9", "Armv9 CPU", _CPU, aliases=("arm", "aarch64")),
)
_BY_NAME = {name: t for t in TARGETS for name in (t.name, *t.aliases)}
assert len(_BY_NAME) == sum(1 + len(t.aliases) for t in TARGETS)


def loads_rtx(sm: int) -> bool:
    """Whether a GPU loads any engine of TensorRT-RTX. Those for later GPUs than all it knows load on these, too."""
    return sm > max(t.sm or 0 for t in TARGETS) or any(t.rtx and t.sm == sm for t in TARGETS)


def find_target(name: str) -> Target:
    """The target called `name`, by its own name or an alias."""
    target = _BY_NAME.get(name.lower())
    if target is None:
        several = [part.strip() for part in name.split(",") if part.strip().lower() in _BY_NAME]
        fix = " ".join(f"--target {part}" for part in several) or "instantrt targets"
        raise UserError(f"unknown target {name!r}", expected=", ".join(t.name for t in TARGETS), fix=fix)
    return target
