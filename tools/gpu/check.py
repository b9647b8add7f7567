"""One command for a machine with an NVIDIA GPU: build, try, test, watch with compute-sanitizer, time, report.

    instantrt gpu-check --out benchmarks/gpu/h200 [--part first|second|last] [--stages build,smoke,tests] [--quick]

Needs torch with CUDA, nvcc 13, cmake, ninja, pytest, numpy, ml_dtypes; no network and no TensorRT. Where that is all
there is, the command is `python -m instantrt.tools.gpu.check`, from a checkout. Stages may be run one by one with the
same --out: each adds its part to OUT.json as long as commit, sources and GPU are the same. All of them build first,
which costs a look when it is done. OUT.json and OUT.txt, with the tables of all stages, are written after each stage;
OUT.md and its two plots are for people, as tools/gpu/page.py says; OUT.ncu.csv.gz has every counter of Nsight Compute.
The last lines printed of `bench` are the goals and what became of the predictions; those of `tune` the losses of the
table of configurations.

Where a machine is there for a short time and a command may take ten minutes, three parts look first and prove last:

    first    build, smoke, quick bench, profile, of this GPU's own library alone: within six minutes
    second   build, tests, quick tune
    last     build, sanitize, whole bench

`instantrt gpu-check rtx` does something else: engines of TensorRT-RTX, as tools/gpu/rtx.py says.

    build      libraries for this GPU, and (not in `first`) of what older ones run, compiled for it; side by side
    smoke      each row of the table in each format, in processes whose silence of 25 s ends them
    tests      the pytest module in six processes, 60 s without a word end one
    sanitize   compute-sanitizer's four tools over a few cases of each row, side by side
    bench      kernels and peers; --quick: eight layers with M = 1, 8, 16, 64, 512 and few formats
    profile    Nsight Compute: counters of a few kernels, ours and cuBLAS's, launched once and cold
    tune       every row of the table that serves a layer; --quick: as bench; OUT.choices is for beside the library

A row of the table that hangs or crashes in `smoke` is left out of later stages by name. What had no time is named, too.
The exit status is 0 only when everything that ran passed; goals that are missed fail nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

from instantrt.tools.gpu import layers, page
from instantrt.tools.gpu.libraries import run
from instantrt.tools.gpu.stages import STAGES, GpuRun, perform
from instantrt.tools.gpu.tables import text
from instantrt.tools.gpu.words import parser
from instantrt.tools.places import ROOT

QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit"
SOURCES = ("plugins/**/*.cu", "plugins/**/*.h", "plugins/**/*.cpp", "plugins/**/*.py", "tools/gpu/*")


@dataclass(frozen=True)
class ShortRun:
    """Stages of one command and how many seconds all may take; `native` leaves out what older GPUs run."""

    stages: tuple[str, ...]
    quick: bool
    native: bool
    seconds: float


PARTS = {
    "first": ShortRun(("build", "smoke", "bench", "profile"), True, True, 345),
    "second": ShortRun(("build", "tests", "tune"), True, False, 450),
    "last": ShortRun(("build", "sanitize", "bench"), False, True, 560),
}
IDENTITY = ("commit", "sources", "gpu")  # parts of one report share these


def query(fields: str) -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        sys.exit("no GPU: nvidia-smi is not on PATH. Run this on a machine with an NVIDIA GPU and its driver.")
    status, said = run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"])
    if status:
        sys.exit(f"no GPU: nvidia-smi said {said.strip()!r}. Run this on a machine with an NVIDIA GPU and its driver.")
    return dict(zip(fields.split(","), (v.strip() for v in said.strip().split(",")), strict=True))


def commit() -> str:
    status, said = run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    return said.strip() if status == 0 else "unknown: not a git checkout"


def sources(root: Path = ROOT) -> str:
    """A digest of what is measured: two trees of one commit, or of none, may differ."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()}):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def earlier(path: Path, identity: dict[str, str]) -> dict[str, Any]:
    """The report at `path` if it is of the same commit, sources and GPU; else a new one."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return dict(identity)
    return report if {k: report.get(k) for k in IDENTITY} == identity else dict(identity)


def write(path: Path, content: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content)
    partial.replace(path)


def parse_stages(names: str) -> list[str]:
    asked = names.split(",")
    if unknown := sorted(set(asked) - set(STAGES)):
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; expected {','.join(STAGES)}")
    return [name for name in STAGES if name in asked or name == "build"]


def parse_layers(names: str) -> tuple[str, ...]:
    """N x K of weights: tiles of 16 rows, groups of 128."""
    found = tuple(names.split(","))
    for layer in found:
        sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", layer)
        if not sizes or int(sizes[1]) % 16 or int(sizes[2]) % 128:
            raise argparse.ArgumentTypeError(
                f"{layer!r}; expected NxK, as 4096x14336: N a multiple of 16, K a multiple of 128"
            )
    return found


def parse_formats(names: str) -> tuple[str, ...]:
    formats = tuple(names.split(","))
    for name in formats:
        try:
            layers.parse_format(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return formats


def said(name: str, part: dict[str, Any], most: int = 10**6) -> str:
    """A stage's tables; a mistake in them costs them alone."""
    try:
        return text(name, part, most)
    except Exception as error:
        return f"== {name}: no table: {type(error).__name__}: {error}"


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    options = parser(__doc__, prog)
    options.add_argument(
        "--out", type=Path, default=ROOT / "build" / "gpu_check", help="OUT.json, OUT.txt, OUT.md; else build/gpu_check"
    )
    options.add_argument("--part", choices=PARTS, help="the stages of one command, and a limit for all of it")
    options.add_argument("--stages", type=parse_stages, help=",".join(STAGES))
    options.add_argument("--quick", action="store_true", help="bench and tune: fewer layers, rows of x and formats")
    options.add_argument("--layers", type=parse_layers, default=(), metavar="NxK,...", help="tune: these instead")
    options.add_argument(
        "--formats", type=parse_formats, default=layers.TUNED, metavar="FORMAT,...",
        help="tune: these, as 'int4 g64,a8w4 g128'; else " + ", ".join(layers.TUNED),
    )  # fmt: skip
    args = options.parse_args(words)
    began = time.monotonic()
    plan = PARTS.get(args.part, ShortRun(tuple(STAGES), args.quick, False, float("inf")))
    quick = plan.quick or args.quick
    for layer, name in product(layers.names(quick, args.layers), args.formats):
        (_, k), (_, group, _) = layers.size(layer), layers.parse_format(name)
        if group and k % group:
            options.error(f"--formats: {name!r} does not divide K = {k} of {layer}; name layers by --layers")
    stages: list[str] = args.stages or list(plan.stages)

    before = query(QUERY)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    out = args.out.with_name(args.out.name + ".json")
    report = earlier(out, {"commit": commit(), "sources": sources(), "gpu": before["name"]})
    report |= {"before": report.get("before", before), "torch": metadata.version("torch")}
    sm = int(query("compute_cap")["compute_cap"].replace(".", ""))
    gpu = GpuRun(sm, quick, report, plan.native, out=out, layers=args.layers, formats=args.formats)
    expected = {name: STAGES[name].expected[quick] for name in stages}
    print(f"{before['name']}: expected {', '.join(f'{n} {s} s' for n, s in expected.items())};", end=" ")
    print(f"together {sum(expected.values())} s, at most {plan.seconds:g} s", flush=True)
    for i, name in enumerate(stages):
        gpu.deadline = began + plan.seconds - sum(expected[later] for later in stages[i + 1 :])
        print(f"-- {name} begins at {time.monotonic() - began:.0f} s, expected {expected[name]} s", flush=True)
        report[name] = perform(name, gpu)
        write(out, json.dumps(report, indent=1) + "\n")
        done = [said(stage, report[stage]) for stage in STAGES if stage in report]
        write(out.with_suffix(".txt"), "\n".join(done) + "\n")
        print(said(name, report[name], 45), flush=True)
    report["after"] = query(QUERY)  # ends this process where the GPU is lost
    write(out, json.dumps(report, indent=1) + "\n")
    try:
        page.write(out)
    except Exception as error:
        print(f"no page: {type(error).__name__}: {error}")
    failed = [name for name in stages if not report[name]["passed"]]
    print(f"{'FAILED: ' + ', '.join(failed) if failed else 'PASSED'}: {out}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
