"""How many CPUs this process has to itself: what its affinity leaves, and the quota of its control group."""

from __future__ import annotations

import os
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """At least 1. Other processes may run on them, too: how busy they are now says nothing about a minute later."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(allowed, quota(MOUNT, OWN))))


def quota(mount: Path, own: Path) -> float:
    """CPUs that the process's control group (version 2) or one above it grants; infinite where none sets a limit."""
    lines = own.read_text().splitlines() if own.is_file() else []
    group = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    limits = [
        (folder / "cpu.max").read_text().split()
        for folder in (mount / group, *(mount / group).parents)
        if (folder / "cpu.max").is_file()
    ]
    return min((int(most) / int(period) for most, period in limits if most != "max"), default=float("inf"))
