"""Engine builds measured on this machine: `instantrt bench engine decoder-12 --out FILE.json`.

Writes a checkpoint of random weights in a known model's shape, compiles it as a user would, and records time, size and
the memory of all processes together.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from instantrt.tools.bench.synthetic import DECODER_12, QWEN2_7B, write_checkpoint

SHAPES = {"decoder-12": DECODER_12, "qwen2-7b": QWEN2_7B}


def processes(root: int) -> Iterator[int]:
    """`root` and all that it started."""
    yield root
    for children in Path(f"/proc/{root}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from processes(int(child))


@dataclass
class Usage:
    """What a process tree used. Memory is anonymous: mapped files can be dropped when others need the room."""

    peak: int = 0  # bytes, of all processes together
    builder_peak: int = 0  # bytes, of the process that builds the engine
    builder_seconds: float = 0.0  # for how long such a process was there
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def sample(self, root: int, interval: float) -> None:
        total = builder = 0
        for pid in processes(root):
            size = anonymous(pid)
            total += size
            if b"tensorrt.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                builder = size
                self.builder_seconds += interval
        self.peak, self.builder_peak = max(self.peak, total), max(self.builder_peak, builder)


def anonymous(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def run_measured(command: list[str]) -> Usage:
    """Runs `command`, sampling its memory ten times a second."""
    usage, started, interval = Usage(), time.monotonic(), 0.1
    child = subprocess.Popen(command)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(interval):
            try:
                usage.sample(child.pid, interval)
            except (FileNotFoundError, ProcessLookupError):
                continue  # a process ended while it was read

    sampler = threading.Thread(target=sample)
    sampler.start()
    status = child.wait()
    done.set()
    sampler.join()
    if status:
        sys.exit(status)
    usage.seconds = time.monotonic() - started
    times = resource.getrusage(resource.RUSAGE_CHILDREN)
    usage.cpu_seconds = times.ru_utime + times.ru_stime
    return usage


def main(
    shape: Annotated[str, typer.Argument(help=" or ".join(SHAPES))],
    work: Annotated[Path, typer.Option(help="scratch folder; emptied afterwards")] = Path("build/bench"),
    out: Annotated[Path | None, typer.Option(help="where to write the record")] = None,
    option: Annotated[list[str] | None, typer.Option(help="option for compile, instead of int4 g128 for sm89")] = None,
) -> None:
    """Compile a model of random weights and record what it took."""
    options = option or ["--target=sm89", "--quant=a16w4", "--group-size=128", "--builder=tensorrt-rtx"]
    model, target = work / "model", work / "out"
    shutil.rmtree(work, ignore_errors=True)
    write_checkpoint(model, SHAPES[shape])
    load = round(os.getloadavg()[0], 1)  # what else the machine was doing: with it, wall time says little
    try:
        command = [sys.executable, "-m", "instantrt", "compile", str(model), *options, "-o", str(target)]
        usage = run_measured(command)
        artifacts = json.loads((target / "manifest.json").read_text())["artifacts"]
        record = {
            "shape": shape,
            "options": options,
            "checkpoint_bytes": (model / "model.safetensors").stat().st_size,
            **{key: round(value, 1) for key, value in asdict(usage).items()},
            "load_average_before": load,
            "engines": {a["target"]: a["engine"]["bytes"] for a in artifacts if a["kind"] == "engine"},
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU",
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    text = json.dumps(record, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
