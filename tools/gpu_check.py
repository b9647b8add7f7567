"""One command for a machine with an NVIDIA GPU: build, test, watch with compute-sanitizer, benchmark, report.

    python -m tools.gpu_check --out benchmarks/gpu/h200 [--quick] [--skip-bench]

Needs torch with CUDA, nvcc 13, cmake, ninja, pytest, numpy; no network and no TensorRT. Writes OUT.json (GPU, driver,
commit, clocks, every test case, sanitizer results, all timings, fractions of the measured read bandwidth) and OUT.png.
The exit status is 0 only when everything that ran passed; what could not run is named with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


def run(command: list[str], **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def device() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        sys.exit("no GPU: nvidia-smi is not on PATH. Run this on a machine with an NVIDIA GPU and its driver.")
    status, text = run(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "--id=0"])
    if status:
        sys.exit(f"no GPU: nvidia-smi said {text.strip()!r}. Run this on a machine with an NVIDIA GPU and its driver.")
    return dict(zip(QUERY.split(","), (v.strip() for v in text.strip().split(",")), strict=True))


def build(folder: Path, architectures: str) -> Path:
    """libinstantrt_kernels.so for these CUDA architectures."""
    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        "cmake",
        "-S",
        "plugins",
        "-B",
        str(folder),
        "-G",
        "Ninja",
        f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",
    ]
    for command in (configure, ["cmake", "--build", str(folder)]):
        status, text = run(command)
        if status:
            sys.exit(f"{' '.join(command)} failed:\n{text[-4000:]}")
    return folder / "libinstantrt_kernels.so"


def tests(libraries: dict[str, Path]) -> dict[str, Any]:
    """pytest without the repository's own fixtures: those need the whole compiler. `cases` names every test."""
    names = {f"INSTANTRT_KERNELS{suffix}": str(path) for suffix, path in libraries.items()}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-rfs", "tests/plugins/test_gpu_kernels.py"]
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        status, text = run([*command, f"--junit-xml={folder}/tests.xml"], **names)
        cases = by_outcome(Path(folder, "tests.xml"))
    summary = text.strip().splitlines()[-12:]
    return {"passed": status == 0, "seconds": round(time.time() - start), "summary": summary, "cases": cases}


def by_outcome(report: Path) -> dict[str, list[str]]:
    """The test cases of a JUnit report; an interrupted run leaves none."""
    outcomes: dict[str, list[str]] = {"passed": [], "failure": [], "error": [], "skipped": []}
    if report.exists():
        for case in ElementTree.parse(report).iter("testcase"):
            outcome = next((child.tag for child in case if child.tag in outcomes), "passed")
            outcomes[outcome].append(case.attrib["name"])
    return outcomes


def sanitize(library: Path) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not on PATH"}
    result = {}
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", "tools.gpu.small", str(library)]
        status, text = run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        result[name] = {"passed": status == 0, "summary": text.strip().splitlines()[-3:]}
    return result


def commit() -> str:
    status, text = run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    return text.strip() if status == 0 else "unknown: not a git checkout"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "gpu_check", help="OUT.json and OUT.png are written"
    )
    parser.add_argument("--quick", action="store_true", help="three layers instead of eight")
    parser.add_argument("--skip-bench", action="store_true", help="build, test and sanitize only")
    args = parser.parse_args()

    import torch

    before = device()
    major, minor = torch.cuda.get_device_capability(0)
    native = f"{major}{minor}a-real" if major == 9 else f"{major}{minor}-real"
    folder = ROOT / "build" / "gpu_check_libraries"
    libraries = {
        "": build(folder / "native", native),
        "_75": build(folder / "75", "75-virtual"),
        "_80": build(folder / "80", "80-virtual"),
    }
    report: dict[str, Any] = {
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "before": before,
    }
    report["tests"] = tests(libraries)
    print("tests:", *report["tests"]["summary"], sep="\n  ")
    report["sanitizer"] = sanitize(libraries[""])
    print("sanitizer:", json.dumps(report["sanitizer"], indent=2))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not args.skip_bench:
        from tools.gpu import bench

        reader = folder / "libread.so"
        status, text = run(
            ["nvcc", "-O3", "-shared", "-Xcompiler", "-fPIC", "-arch=native", "tools/gpu/read.cu", "-o", str(reader)]
        )
        if status:
            sys.exit(f"the read benchmark does not compile:\n{text}")
        report |= bench.run(libraries[""], reader, args.quick)
        try:
            bench.plot(report, args.out.with_suffix(".png"))
        except ImportError as error:
            print(f"no plot: {error}")
    report["after"] = device()
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    failed = not report["tests"]["passed"] or any(
        isinstance(v, dict) and not v["passed"] for v in report["sanitizer"].values()
    )
    print(f"{'FAILED' if failed else 'PASSED'}: {args.out.with_suffix('.json')}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
