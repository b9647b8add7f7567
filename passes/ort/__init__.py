"""Lowers Q/DQ graphs to what ONNX Runtime runs fast on a CPU."""

from typing import Literal

Preset = Literal["exact", "fast"]  # how many bits 16-bit activations keep: pipeline.lower_onnxruntime
