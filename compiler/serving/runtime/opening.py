"""An artifact's model file -> what runs it, on the one runtime that it was made for: no other needs to be installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from .scheduler import Engine, SequenceLimits


def open_engine(
    model: Path,
    libraries: Sequence[Path],
    limits: SequenceLimits,
    *,
    runtime: str,
    cache: str,
    threads: int = 0,
    spinning: bool | None = None,
    gpu: int = 0,
) -> Engine:
    """RuntimeError where the model was not made for `limits`. It and its libraries are code: who calls checked them.

    runtime   onnxruntime, or the module that built the engine: tensorrt or tensorrt_rtx
    cache     shared or concat, as the manifest has it
    threads, spinning   of ONNX Runtime: see `open_session`
    """
    if runtime == "onnxruntime":
        from .onnx_engine import ENGINES

        return ENGINES[cache](model, limits.rows, limits.length, threads, spinning, libraries)
    from . import cuda, tensorrt_engine

    trt = importlib.import_module(runtime)
    return tensorrt_engine.open_engine(model, libraries, trt, cuda.Device(gpu), limits.rows, limits.length)
