"""Which of several artifacts this machine can run: `find_artifact` takes the only one, without asking."""

from __future__ import annotations

import platform

from instantrt.compiler.artifact.manifest import Artifact
from instantrt.compiler.backend.tensorrt.gpu import gpus

ARM = ("aarch64", "arm64")  # what systems call it


def runs_on_cpu(artifact: Artifact) -> bool:
    """Is it a model for ONNX Runtime, and for processors of this machine's kind?"""
    return artifact.kind == "onnx" and (artifact.target == "armv9") == (platform.machine() in ARM)


def runs_here(artifact: Artifact) -> bool:
    """Likewise, or is it an engine for a GPU that is here?"""
    engine = artifact.engine or {}
    return runs_on_cpu(artifact) or (artifact.kind == "engine" and any(gpu.sm == engine["sm"] for gpu in gpus()))
