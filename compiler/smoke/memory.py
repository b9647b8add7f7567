"""Whether this machine can hold an artifact for a CPU: asked before one is written that could not be run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from instantrt.passes.core.errors import UserError

MEMINFO = Path("/proc/meminfo")


def check_memory(sizes: Mapping[str, int]) -> None:
    """UserError for a target whose artifact, of so many bytes, is larger than the memory that is available."""
    available = available_memory()
    for target, size in sizes.items():
        if available is not None and size > available:
            raise UserError(
                f"the artifact for {target} cannot run once on this machine",
                expected=f"{size / 1e9:.1f} GB of memory or more",
                found=f"{available / 1e9:.1f} GB available",
                fix="--no-smoke writes it without running it; nothing else needs the model in memory",
            )


def available_memory() -> int | None:
    """Bytes that a new process may have without swapping; None where the system does not say."""
    try:
        (line,) = (line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
