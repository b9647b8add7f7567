"""From a lowered ONNX file to a TensorRT engine in OUT/<target>/: who builds it, with which settings, what came out."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.artifact.manifest import ENGINE
from instantrt.compiler.backend.tensorrt.build import INSTALL, PRODUCT, EngineSpec, Profile, build
from instantrt.compiler.backend.tensorrt.fusion import WEIGHT, Read, weight_reads
from instantrt.compiler.backend.tensorrt.gpu import describe, gpus
from instantrt.compiler.backend.tensorrt.header import Flavour
from instantrt.compiler.options import Builder, EngineOptions
from instantrt.compiler.say import At, Say
from instantrt.compiler.target import Target
from instantrt.passes.core.errors import UserError

LAYERS, TIMINGS = "model.layers.txt", "timing.cache"
FLOAT16, BFLOAT16, INT4 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.int4)


@dataclass(frozen=True)
class EngineSettings:
    """What the builder of an engine is told besides the graph.

    linears   the MatMul nodes with a quantized weight: how each is read is asked of the builder afterwards
    """

    target: Target
    precision: str
    profiles: tuple[Profile, ...]
    options: EngineOptions
    plugins: tuple[Path, ...]
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """Who builds for a target on this machine; None and the reason where nobody can."""

    flavour: Flavour | None
    reason: str = ""


def compute_type(target: Target, stored: Mapping[np.dtype[Any], int]) -> np.dtype[Any]:
    """The 16-bit type an engine computes in: the checkpoint's; float16 where the GPU has no bfloat16.

    stored   bytes of the checkpoint's float weights by type
    """
    most = max(stored, key=lambda dtype: stored[dtype], default=FLOAT16)
    return BFLOAT16 if most == BFLOAT16 and target.bf16 else FLOAT16


def choose_builder(
    target: Target,
    wanted: Builder,
    *,
    int4: bool = False,
    options: EngineOptions | None = None,
    from_kit: bool = False,
) -> Choice:
    """The builder for `target` with these options.

    int4       it is to multiply 4-bit weights itself, no plugin of ours
    from_kit   a build kit is there already: an error advises none

    auto: full TensorRT beside the GPU itself, else TensorRT-RTX, which needs no GPU, else a build kit.
    """
    assert target.sm is not None
    why_not = {"tensorrt": no_tensorrt(target), "tensorrt_rtx": no_rtx(target, int4, options or EngineOptions())}
    if wanted == "kit":
        return Choice(None, "a build kit was asked for")
    order = ("tensorrt", "tensorrt_rtx") if wanted == "auto" else (wanted.replace("-", "_"),)
    for flavour in order:
        if not why_not[flavour]:
            return Choice(cast(Flavour, flavour))
    reasons = "; ".join(f"{PRODUCT[flavour]}: {why_not[flavour]}" for flavour in order)
    if wanted != "auto":
        fix = ("" if from_kit else "compile with --builder auto leaves a build kit; ") + by_tensorrt(target)
        raise UserError(f"cannot build for {target.name} here", found=reasons, fix=fix)
    return Choice(None, reasons)


def by_tensorrt(target: Target) -> str:
    """How full TensorRT comes to build for `target`."""
    needs = INSTALL["tensorrt"].format(target.tensorrt)
    return f"full TensorRT builds beside an {target.name} GPU: {needs}"


def no_tensorrt(target: Target) -> str:
    """Why full TensorRT cannot build for `target` here, or nothing."""
    if importlib.util.find_spec("tensorrt") is None:
        return "not installed"
    if all(gpu.sm != target.sm for gpu in gpus()):
        return f"builds for the GPU it runs on; this machine has {describe()}"
    return ""


def no_rtx(target: Target, int4: bool, options: EngineOptions) -> str:
    """Why TensorRT-RTX cannot build for `target` here, or nothing."""
    if not target.rtx:
        return f"has no {target.name}: neither builds for it nor loads there"
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return f"not installed: {INSTALL['tensorrt_rtx']}"
    if target.sm == 75 and int4:
        return "has no int4 on sm75"
    if options.version_compatible or options.hardware_compatible:
        return "has no version-compatible or hardware-compatible engines"
    return ""


def build_engine(
    flavour: Flavour, settings: EngineSettings, onnx: Path, folder: Path, timings: Path, say: Say
) -> dict[str, Any]:
    """Builds `folder`/model.engine and says what it is: the engine part of the manifest.

    The next build for this GPU starts from the `timings` of this one.
    """
    target = settings.target
    assert target.sm is not None
    spec = EngineSpec(
        flavour=flavour,
        onnx=onnx,
        engine=folder / ENGINE,
        layers=folder / LAYERS,
        profiles=settings.profiles,
        sms=(target.sm,) if flavour == "tensorrt_rtx" else (),
        plugins=settings.plugins,
        options=replace(settings.options, timing_cache=timings),
        releases=target.tensorrt,
    )
    built = build(spec, lambda fraction, phase: say(At(f"{target.name} {fraction:4.0%} {phase}")))
    read = weight_reads(built.layers.read_text("utf-8"), settings.linears)
    return {
        "builder": flavour,
        "version": built.version,
        "sm": target.sm,
        "precision": settings.precision,
        "profiles": [{name: list(map(list, shape)) for name, shape in p.items()} for p in settings.profiles],
        "options": {k: v for k, v in asdict(settings.options).items() if v and k != "timing_cache"},
        "bytes": built.bytes,
        "weights": {c.linear: f"{c.dtype} {c.read.value}".strip() for c in read},
    }


def timing_cache(out: Path, target: Target) -> Path:
    """Beside the artifact's folder, which each build replaces."""
    return out / f"{target.name}.{TIMINGS}"


def quantized_linears(graph: gs.Graph) -> tuple[str, ...]:
    """The linears whose weight the native lowerings left to a DequantizeLinear."""
    names = (n.name for n in graph.nodes if n.op == "DequantizeLinear" and isinstance(n.inputs[0], gs.Constant))
    return tuple(name.removesuffix(WEIGHT) for name in names if name.endswith(WEIGHT))


def native_int4(graph: gs.Graph) -> bool:
    """Does a lowered graph hold 4-bit weights of TensorRT's own type?"""
    return any(node.op == "DequantizeLinear" and node.inputs[0].dtype == INT4 for node in graph.nodes)


def expanded(engine: Mapping[str, Any]) -> list[str]:
    """The linears whose weight is written out as a float matrix on every run."""
    return [name for name, read in engine["weights"].items() if not read.endswith(Read.FUSED.value)]
