"""The stages of instantrt.tools.gpu.check. Each takes the ring and returns its part of the report, with `passed`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from instantrt.tools.gpu import goals, layers, small, tables
from instantrt.tools.gpu.library import HUNG_ROWS, Library
from instantrt.tools.gpu.watch import ChildJob, Outcome, failures, parse, run_all

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu_check_libraries"
READER, VOLTA = FOLDER / "reader" / "libread.so", FOLDER / "volta" / "libinstantrt_kernels_volta.so"
TESTS = ("tests/plugins/test_gpu_kernels.py", "tests/plugins/test_gpu_volta.py")
SANITIZERS = {  # and their options; errors of API calls are the launcher's to report
    "memcheck": ["--padding", "256", "--report-api-errors", "no"], "racecheck": [], "synccheck": [], "initcheck": [],
}  # fmt: skip
PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "--noconftest",
    "-p",
    "instantrt.tools.gpu.progress",
    "-p",
    "no:cacheprovider",
]
FEW_THREADS = {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}  # several children share the cores
LONG = 100  # lines
PATIENCE = 300  # seconds
FIRST_PORT = 49152
Part = dict[str, Any]


@dataclass
class Ring:
    """A run on one GPU: `sm` is its compute capability times ten, `report` what earlier stages found."""

    sm: int
    quick: bool
    report: dict[str, Any]

    @cached_property
    def built(self) -> Part:
        """All libraries, side by side; what is already built costs a look."""
        native = f"{self.sm}a-real" if self.sm == 90 else f"{self.sm}-real"
        builds: dict[str, Callable[[], str]] = {
            "": lambda: cmake(FOLDER / "native", f"-DCMAKE_CUDA_ARCHITECTURES={native}"),
            "_75": lambda: cmake(FOLDER / "75", *older(75, self.sm)),
            "_80": lambda: cmake(FOLDER / "80", *older(80, self.sm)),
            "_VOLTA": lambda: volta(self.sm),
            "reader": lambda: reader(self.sm),
        }
        with ThreadPoolExecutor() as pool:
            errors = dict(zip(builds, pool.map(lambda make: make(), builds.values()), strict=True))
        return {"passed": not any(errors.values()), "failures": {name: text for name, text in errors.items() if text}}

    def library(self, suffix: str = "") -> Path | None:
        """A library that was built, else None: its failure is in the report."""
        if suffix in self.built["failures"]:
            return None
        if alone := {"reader": READER, "_VOLTA": VOLTA}.get(suffix):
            return alone
        return FOLDER / {"": "native", "_75": "75", "_80": "80"}[suffix] / "libinstantrt_kernels.so"

    @property
    def hung_rows(self) -> list[str]:
        """Rows of the table, each with its SM, that took the GPU or their process with them in the smoke stage."""
        return self.report.get("smoke", {}).get("hung_rows", [])  # type: ignore[no-any-return]

    @property
    def environment(self) -> dict[str, str]:
        return {HUNG_ROWS: ",".join(self.hung_rows), **FEW_THREADS}


def run(command: list[str], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output. A program that is absent, or silent for minutes beside a lost GPU, has failed, too."""
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    return done.returncode, done.stdout


def older(sm: int, here: int) -> list[str]:
    """Options for what an older SM gets, compiled for this one: of PTX each process would compile all, for minutes."""
    return ["-DCMAKE_CUDA_ARCHITECTURES=OFF", f"-DCMAKE_CUDA_FLAGS={' '.join(target(sm, here))}"]


def target(sm: int, here: int) -> list[str]:
    return ["-gencode", f"arch=compute_{sm},code=sm_{here}"]


def cmake(folder: Path, *options: str) -> str:
    """libinstantrt_kernels.so; what went wrong, or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    where = ["-S", "plugins", "-B", str(folder), "-G", "Ninja"]
    configure = ["cmake", *where, *options]
    target = ["cmake", "--build", str(folder), "--target", "instantrt_kernels"]
    for command in (configure, target):
        status, text = run(command)
        if status:
            return f"{' '.join(command)} failed:\n{text[-4000:]}"
    return ""


def nvcc(out: Path, *arguments: str) -> str:
    """A library without CMake; what went wrong, or nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    status, text = run(["nvcc", "-O3", "-shared", "-Xcompiler", "-fPIC", *arguments, "-o", str(out)])
    return text[-4000:] if status else ""


def reader(sm: int) -> str:
    """The benchmark's own kernels."""
    return nvcc(READER, *target(sm, sm), "tools/gpu/read.cu")


def volta(sm: int) -> str:
    """Volta's kernels, whose m8n8k4 products newer GPUs compute, too: slowly, and right."""
    sources = [f"plugins/weight_only_gemm/{name}" for name in ("volta.cu", "volta.cpp", "config.cpp")]
    options = ["-std=c++17", "-DWOG_VOLTA", "-x", "cu", *target(75, sm), "-Iplugins/runtime/gpu"]
    return nvcc(VOLTA, *options, *sources)


def build(ring: Ring) -> Part:
    return ring.built


def smoke(ring: Ring) -> Part:
    """Every row of the table in every format, each row in a process of its own; a silent one is killed."""
    jobs = [
        small_job(path, "poisoned", cases, 25) for path, every in smoke_cases(ring) for cases in by_row(every).values()
    ]
    outcomes = run_all(jobs, 150, 8)
    lost = sorted({row_of(o.name) for o in outcomes if o.outcome in ("hung", "crashed")})
    errors: dict[str, float] = {}
    for o in outcomes:
        errors[row_of(o.name)] = max(errors.get(row_of(o.name), 0.0), o.data or 0.0)
    return summary(outcomes) | {"hung_rows": lost, "errors": errors}


def row_of(case: str) -> str:
    """As HUNG_ROWS has it: libraries for several SMs have rows of one name."""
    return " ".join(case.split()[:2])


def smoke_cases(ring: Ring) -> list[tuple[Path, list[str]]]:
    """Cases of the native library, and of those with the code and the tables of older GPUs."""
    found = []
    for suffix, sm, types in (("", ring.sm, (0, 1)), ("_75", 75, (0,)), ("_80", 80, (0, 1))):
        if path := ring.library(suffix):
            # multiprocessors do not change which rows serve: what the emulator and every GPU can run
            found.append((path, small.every_case(Library(path), {"sm": sm, "sm_count": 132}, types)))
    return found


def by_row(cases: Iterable[str]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        rows[row_of(case)].append(case)
    return rows


def small_job(library: Path, memory: str, cases: list[str], stall: float, under: tuple[str, ...] = ()) -> ChildJob:
    command = [*under, sys.executable, "-m", "instantrt.tools.gpu.small", memory, str(library)]
    return ChildJob(lambda left: [*command, *left], cases, stall, FEW_THREADS)


def tests(ring: Ring) -> Part:
    """The pytest modules in six processes; a case that hangs or loses the GPU costs itself."""
    names = {f"INSTANTRT_KERNELS{s}": str(path) for s in ("", "_75", "_80", "_VOLTA") if (path := ring.library(s))}
    status, text = run([*PYTEST, "--collect-only", *TESTS], names)
    cases = collected(text)
    if not cases:
        return {"passed": False, "failures": {" ".join(TESTS): f"collected nothing, status {status}\n{text[-2000:]}"}}
    size = -(-len(cases) // 6)
    shards = [cases[i : i + size] for i in range(0, len(cases), size)]
    environment = {**ring.environment, **names}
    jobs = [ChildJob(lambda left: [*PYTEST, *left], shard, 60, environment) for shard in shards]
    return summary(run_all(jobs, 240, len(jobs)))


def collected(text: str) -> list[str]:
    return [case for line in text.splitlines() for case in (parse(line) or {}).get("collected", [])]


def sanitize(ring: Ring) -> Part:
    """compute-sanitizer's four tools over a few cases of every row, side by side, without torch."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    path = ring.library()
    if tool is None or path is None:
        return {"passed": False, "failures": {"compute-sanitizer": "not on PATH" if path else "nothing was built"}}
    every = small.every_case(Library(path), {"sm": ring.sm, "sm_count": 132})
    cases = [case for case in small.few_cases(every) if row_of(case) not in ring.hung_rows]
    jobs: dict[str, ChildJob] = {}
    for (name, options), half in product(SANITIZERS.items(), (0, 1)):
        port = str(FIRST_PORT + 32 * len(jobs))  # each looks for a free one from here
        under = (tool, "--tool", name, "--port", port, "--error-exitcode", "9", *options)
        jobs[f"{name} {half + 1}/2"] = small_job(path, "fresh", cases[half::2], 90, under)
    run_all(jobs.values(), 280, len(jobs))
    named = [replace(o, name=f"{name}: {o.name}") for name, job in jobs.items() for o in job.outcomes.values()]
    part = summary(named)
    found = {name: job.said[:60] for name, job in jobs.items() if job.status}
    return part | {"passed": part["passed"] and not found, "found": found}


def bench(ring: Ring) -> Part:
    cases = ["roofs", "facts", *layers.cases(ring.quick)]
    outcomes = measure(ring, "instantrt.tools.gpu.bench", cases, 470, [str(ring.library("reader"))])
    data = {o.name: o.data for o in outcomes if o.data}
    roof = data.pop("roofs", None)
    part = summary(outcomes) | {"facts": data.pop("facts", {})}
    absent = {f"{case}, {who}": why for case, d in data.items() for who, why in d["failures"].items()}
    mine = {name: why for name, why in absent.items() if name.split(", ")[1].startswith(("int", "a8"))}
    timings = [t for d in data.values() for t in d["timings"]]
    part |= {"passed": part["passed"] and not mine, "absent": absent, "timings": timings}
    return part | {"roofs": roof, "timings": [tables.with_floor(t, roof) for t in timings]} if roof else part


def tune(ring: Ring) -> Part:
    outcomes = measure(ring, "instantrt.tools.gpu.tune", layers.cases(ring.quick), 470)
    rows = [row for o in outcomes for row in o.data or []]
    part = summary(outcomes)
    return part | {"passed": part["passed"] and not any("wrong" in row for row in rows), "rows": rows}


def measure(ring: Ring, module: str, cases: list[str], seconds: float, more: Iterable[str] = ()) -> list[Outcome]:
    """One child alone on the GPU, for so many seconds at most."""
    if (path := ring.library()) is None:
        return [Outcome(module, "not run", "nothing was built")]
    command = [sys.executable, "-m", module, str(path), *more]
    return run_all([ChildJob(lambda left: [*command, *left], cases, 90, ring.environment)], seconds, 1)


def summary(outcomes: list[Outcome]) -> Part:
    counts = Counter(o.outcome for o in outcomes)
    slowest = sorted(outcomes, key=lambda o: -o.seconds)[:5]
    return {
        "passed": bool(outcomes) and not failures(outcomes),
        "counts": dict(counts),
        "failures": failures(outcomes),
        "skipped": {o.name: o.message for o in outcomes if o.outcome == "skipped"},
        "slowest": {o.name: o.seconds for o in slowest},
        "cases": {o.name: o.outcome for o in outcomes},
    }


def text(name: str, part: Part, most: int = 10**6) -> str:
    """What a person reads of one stage: no long table, and no more lines of the others, than `most`."""
    lines = [f"== {name}: {'passed' if part['passed'] else 'FAILED'} in {part['seconds']} s {part.get('counts', '')}"]
    lines += grouped(part.get("failures", {}))[:most]
    lines += [f"  {who}: {line}" for who, said in part.get("found", {}).items() for line in said[:12]]
    if part.get("errors"):
        row = max(part["errors"], key=part["errors"].__getitem__)
        lines.append(f"  largest relative error before the output's rounding: {part['errors'][row]:.2g}, {row}")
    if part.get("hung_rows"):
        lines.append(f"  later stages leave out: {', '.join(part['hung_rows'])}")
    if "timings" in part:
        lines += sorted({f"  {case.split(', ')[1]}: {why}" for case, why in part["absent"].items()})[:most]
        lines += tables.time_table(part["timings"])[:most] if most > LONG else []
    lines += [f"  {name}: {answer}" for name, answer in part.get("facts", {}).items()]
    if "roofs" in part:
        lines += [*tables.roof_table(part["roofs"]), *goals.goal_table(goals.judge(part["timings"]))]
    if "rows" in part:
        lines += tables.tune_table(part["rows"])[:most]
    return "\n".join(lines)


def grouped(failures: Mapping[str, str]) -> list[str]:
    """A line for each reason, with the cases that have it: how many, and the first."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for case, why in failures.items():
        first, *_, last = [line.strip() for line in why.splitlines() if line.strip()] * 2
        reasons[first if last == first else f"{first} ... {last}"].append(case)
    return [
        f"  {cases[0]}{f' and {len(cases) - 1} more' if len(cases) > 1 else ''}: {reason}"
        for reason, cases in reasons.items()
    ]


STAGES: dict[str, Callable[[Ring], Part]] = {
    "build": build, "smoke": smoke, "tests": tests, "sanitize": sanitize, "bench": bench, "tune": tune,
}  # fmt: skip


def perform(name: str, ring: Ring) -> Part:
    """Runs one stage and says how long it took. A mistake in it costs the stage, and not those that follow."""
    start = time.monotonic()
    try:
        part = STAGES[name](ring)
    except Exception:
        part = {"passed": False, "failures": {name: traceback.format_exc()}}
    return {**part, "seconds": round(time.monotonic() - start)}
