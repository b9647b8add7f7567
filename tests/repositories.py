"""Triton repositories, written as the command line does."""

from __future__ import annotations

from pathlib import Path

from instantrt.compiler.artifact.staging import Staging
from instantrt.compiler.serving.config import Served
from instantrt.compiler.serving.repository import stage_repository


def write_repository(out: Path, folder: Path) -> tuple[Served, ...]:
    """Of the artifacts in `out`."""
    with Staging() as staging:
        return stage_repository(out, folder, staging)
