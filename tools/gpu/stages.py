"""The stages of instantrt.tools.gpu.check. Each takes the run and returns its part of the report, with `passed`."""

from __future__ import annotations

import gzip
import importlib.util
import shutil
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from instantrt.tools.gpu import layers, ncu, predictions, small, tables
from instantrt.tools.gpu.choices import choices_file
from instantrt.tools.gpu.libraries import FOLDER, LIBRARIES, make_all, run
from instantrt.tools.gpu.library import HUNG_ROWS, Library
from instantrt.tools.gpu.tables import Part
from instantrt.tools.gpu.watch import ChildJob, Outcome, failures, parse, run_all

TESTS = ("tests/plugins/test_gpu_kernels.py", "tests/plugins/test_gpu_volta.py")
SANITIZERS = {  # and their options; errors of API calls are the launcher's to report
    "memcheck": ["--padding", "256", "--report-api-errors", "no"], "racecheck": [], "synccheck": [], "initcheck": [],
}  # fmt: skip
PYTEST = [
    sys.executable, "-m", "pytest", "--noconftest", "-p", "instantrt.tools.gpu.progress", "-p", "no:cacheprovider",
]  # fmt: skip
FEW_THREADS = {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}  # several children share the cores
BENCH_SECONDS = {True: 150, False: 470}  # at most, by whether it is quick
PROFILE_SECONDS, PROFILE_STALL = 110, 45
COMPILED = {  # cases with a peer that compiles for every shape, by whether the run is quick; last, as they may wait
    True: [f"qwen2-7b gate_up{layers.HUMMING} m={m}" for m in (1, 16, 64)],
    False: [f"{layer}{layers.HUMMING} m={m}" for layer in ("qwen2-7b gate_up", "70b o") for m in (1, 16, 64, 256)],
}
FIRST_PORT = 49152
SILENCE = 10  # seconds after which a stage that goes on says where it is
LARGEST_CSV = 8 << 20  # bytes, compressed, that are kept of Nsight Compute's own words
HUMMING = (
    "humming-kernels, a peer, cannot be imported ({}): no time of it will be taken. Its wheel can be carried: "
    "python -m pip install --no-index --no-deps --target FOLDER humming_kernels-*.whl, and FOLDER on PYTHONPATH"
)


@dataclass
class GpuRun:
    """A run on one GPU: `sm` is its compute capability times ten, `report` what earlier stages found."""

    sm: int
    quick: bool
    report: dict[str, Any]
    native: bool = False  # leave out what older GPUs run
    deadline: float = float("inf")  # of the stage that runs, a time.monotonic(), so that later ones get their time
    out: Path | None = None  # beside which raw data are written: OUT.json
    formats: tuple[str, ...] = layers.TUNED  # that tune times
    layers: tuple[str, ...] = ()  # likewise, instead of those it knows: "4096x14336", n x k

    def seconds(self, most: float) -> float:
        """What a stage that may take `most` has left."""
        return max(0.0, min(most, self.deadline - time.monotonic()))

    @cached_property
    def built(self) -> Part:
        """All libraries that are asked for, side by side; what is already built costs a look."""
        failures = {name: said for name, said in make_all(self.sm, self.native).items() if said}
        return {"passed": not failures, "failures": failures}

    def library(self, name: str = "") -> Path | None:
        """A library that was built, else None: its failure is in the report."""
        library = LIBRARIES[name]
        return None if name in self.built["failures"] or (self.native and library.older) else library.path

    @property
    def hung_rows(self) -> list[str]:
        """Rows of the table, each with its SM, that took the GPU or their process with them in the smoke stage."""
        return self.report.get("smoke", {}).get("hung_rows", [])  # type: ignore[no-any-return]

    @property
    def environment(self) -> dict[str, str]:
        return {HUNG_ROWS: ",".join(self.hung_rows), **FEW_THREADS}


def build(gpu: GpuRun) -> Part:
    return gpu.built


def smoke(gpu: GpuRun) -> Part:
    """Every row of the table in every format, each row in a process of its own; a silent one is killed."""
    jobs = [
        small_job(path, "poisoned", cases, 25) for path, every in smoke_cases(gpu) for cases in by_row(every).values()
    ]
    outcomes = run_all(jobs, gpu.seconds(150), 8)
    lost = sorted({row_of(o.name) for o in outcomes if o.outcome in ("hung", "crashed")})
    errors: dict[str, float] = {}
    for o in outcomes:
        errors[row_of(o.name)] = max(errors.get(row_of(o.name), 0.0), o.data or 0.0)
    return summary(outcomes) | {"hung_rows": lost, "errors": errors}


def row_of(case: str) -> str:
    """As HUNG_ROWS has it: libraries for several SMs have rows of one name."""
    return " ".join(case.split()[:2])


def smoke_cases(gpu: GpuRun) -> list[tuple[Path, list[str]]]:
    """Cases of the native library, and of those with the code and the tables of older GPUs."""
    found = []
    for suffix, sm, types in (("", gpu.sm, (0, 1)), ("_75", 75, (0,)), ("_80", 80, (0, 1))):
        if path := gpu.library(suffix):
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


def tests(gpu: GpuRun) -> Part:
    """The pytest modules in six processes; a case that hangs or loses the GPU costs itself."""
    names = {f"INSTANTRT_KERNELS{s}": str(path) for s in ("", "_75", "_80", "_VOLTA") if (path := gpu.library(s))}
    status, text = run([*PYTEST, "--collect-only", *TESTS], names)
    cases = collected(text)
    if not cases:
        return {"passed": False, "failures": {" ".join(TESTS): f"collected nothing, status {status}\n{text[-2000:]}"}}
    size = -(-len(cases) // 6)
    shards = [cases[i : i + size] for i in range(0, len(cases), size)]
    environment = {**gpu.environment, **names}
    jobs = [ChildJob(lambda left: [*PYTEST, *left], shard, 60, environment) for shard in shards]
    return summary(run_all(jobs, gpu.seconds(240), len(jobs)))


def collected(text: str) -> list[str]:
    return [case for line in text.splitlines() for case in (parse(line) or {}).get("collected", [])]


def sanitize(gpu: GpuRun) -> Part:
    """compute-sanitizer's four tools over a few cases of every row, side by side, without torch."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    path = gpu.library()
    if tool is None or path is None:
        return {"passed": False, "failures": {"compute-sanitizer": "not on PATH" if path else "nothing was built"}}
    every = small.every_case(Library(path), {"sm": gpu.sm, "sm_count": 132})
    cases = [case for case in small.few_cases(every) if row_of(case) not in gpu.hung_rows]
    jobs: dict[str, ChildJob] = {}
    for (name, options), half in product(SANITIZERS.items(), (0, 1)):
        port = str(FIRST_PORT + 32 * len(jobs))  # each looks for a free one from here
        under = (tool, "--tool", name, "--port", port, "--error-exitcode", "9", *options)
        jobs[f"{name} {half + 1}/2"] = small_job(path, "fresh", cases[half::2], 90, under)
    run_all(jobs.values(), gpu.seconds(280), len(jobs))
    named = [replace(o, name=f"{name}: {o.name}") for name, job in jobs.items() for o in job.outcomes.values()]
    part = summary(named)
    found = {name: job.said[:60] for name, job in jobs.items() if job.status}
    return part | {"passed": part["passed"] and not found, "found": found}


def bench(gpu: GpuRun) -> Part:
    if why := humming_absent():
        print(f"  !! {why}", flush=True)
    slow = [] if why else COMPILED[gpu.quick]
    cases = ["roofs", *layers.cases(gpu.quick), *slow, "facts"]
    options = str(gpu.library("reader")), "quick" if gpu.quick else "full"
    outcomes = measure(gpu, "instantrt.tools.gpu.bench", cases, BENCH_SECONDS[gpu.quick], *options)
    data = {o.name: o.data for o in outcomes if o.data}
    roof = data.pop("roofs", None)
    part = summary(outcomes) | {"facts": data.pop("facts", {})}
    absent = {f"{case}, {who}": why for case, d in data.items() for who, why in d["failures"].items()}
    mine = {name: why for name, why in absent.items() if name.split(", ")[1].startswith(("int", "a8"))}
    timings = [t for d in data.values() for t in d["timings"]]
    absent |= {"all, humming": why} if why else {}
    part |= {"passed": part["passed"] and not mine, "absent": absent, "timings": timings}
    if not roof:
        return part
    compared = predictions.compare(timings, roof["read_bytes_per_us"], roof.get("gpu", ""))
    timings = [tables.with_floor(t, roof) for t in timings]
    return part | {"roofs": roof, "timings": timings, "predictions": compared}


def humming_absent() -> str:
    """Why no time of it can be taken, or nothing. Importing it is the child's to try: here it would cost seconds."""
    if importlib.util.find_spec("humming") is None:
        return HUMMING.format("it is not installed")
    status, text = run([sys.executable, "-c", "from humming.layer import HummingLayer"])
    return HUMMING.format((text.strip().splitlines() or ["?"])[-1]) if status else ""


def tune(gpu: GpuRun) -> Part:
    outcomes = measure(gpu, "instantrt.tools.gpu.tune", layers.cases(gpu.quick, gpu.layers), 470, ",".join(gpu.formats))
    rows = [row for o in outcomes for row in o.data or []]
    part = summary(outcomes)
    part |= {"passed": part["passed"] and not any("wrong" in row for row in rows), "rows": rows}
    if gpu.out is None or not rows:
        return part
    path = gpu.out.with_suffix(".choices")
    path.write_text(choices_file(rows, gpu.report["gpu"], gpu.report["commit"]))
    return part | {"choices": path.name}


def measure(gpu: GpuRun, module: str, cases: list[str], seconds: float, *options: str) -> list[Outcome]:
    """One child alone on the GPU, for so many seconds at most."""
    if (path := gpu.library()) is None:
        return [Outcome(module, "not run", "nothing was built")]
    command = [sys.executable, "-m", module, str(path), *options]
    job = ChildJob(lambda left: [*command, *left], cases, 90, gpu.environment, tell=Teller(len(cases)))
    return run_all([job], gpu.seconds(seconds), 1)


@dataclass
class Teller:
    """Says now and then how far a stage of many cases is."""

    cases: int
    done: int = 0
    said: float = field(default_factory=time.monotonic)

    def __call__(self, outcome: Outcome) -> None:
        self.done += 1
        if time.monotonic() - self.said > SILENCE:
            self.said = time.monotonic()
            print(f"  {self.done} of {self.cases}: {outcome.name} {outcome.outcome}", flush=True)


def profile(gpu: GpuRun) -> Part:
    """Nsight Compute over a few cases. Cases whose counters were lost with a child get a second try, without metrics
    asked for by name: ncu refuses to run at all where this GPU has not one of them.
    """
    tool, path, marks = ncu.executable(), gpu.library(), gpu.library("reader")
    if tool is None or path is None or marks is None:
        why = "ncu, Nsight Compute, is not on PATH" if path and marks else "nothing was built"
        return {"passed": False, "failures": {"profile": why}}
    folder = FOLDER / "profile"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    deadline = time.monotonic() + gpu.seconds(PROFILE_SECONDS)
    left, texts = list(ncu.CASES), list[str]()
    found, outcomes = dict[str, list[Mapping[str, Any]]](), dict[str, Outcome]()
    for metrics in (True, False):
        if not left or deadline - time.monotonic() < 10:
            break

        def command(cases: Sequence[str], metrics: bool = metrics) -> list[str]:
            log = folder / f"{metrics:d}-{len(cases)}.csv"
            child = [sys.executable, "-m", "instantrt.tools.gpu.profile", str(path), str(marks)]
            return [*ncu.command(tool, log, metrics), *child, *cases]

        job = ChildJob(command, left, PROFILE_STALL, gpu.environment, tell=Teller(len(left)))
        outcomes |= {o.name: o for o in run_all([job], deadline - time.monotonic(), 1)}
        texts = [log.read_text(errors="replace") for log in sorted(folder.glob("*.csv"))]
        for text in texts:
            found |= ncu.by_case(ncu.parse(text))
        left = [case for case in ncu.CASES if case not in found and outcomes[case].outcome in ("passed", "not run")]
    for case, outcome in outcomes.items():
        if case in found:
            outcomes[case] = replace(outcome, outcome="passed", message="")
        elif outcome.outcome == "passed":
            said = [line for text in texts for line in text.splitlines() if line.startswith(("==ERROR", "==WARN"))]
            outcomes[case] = replace(outcome, outcome="failed", message="ncu gave no counters: " + " ".join(said[:3]))
    rows = [ncu.summarize(case, kernel) for case in ncu.CASES for kernel in found.get(case, [])]
    part = summary(list(outcomes.values()))
    return part | {"profiled": rows, "raw": keep_raw(gpu, texts)}


def keep_raw(gpu: GpuRun, texts: Sequence[str]) -> str:
    """All counters, as Nsight Compute wrote them, beside the report; where they are, or why not."""
    packed = gzip.compress("\n".join(texts).encode())
    if gpu.out is None or len(packed) > LARGEST_CSV:
        return f"not kept: {len(packed)} bytes"
    path = gpu.out.with_name(f"{gpu.out.stem}.ncu.csv.gz")
    path.write_bytes(packed)
    return path.name


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


@dataclass(frozen=True)
class GpuStage:
    """`expected` seconds on an H100 or H200 with 16 cores, whole and quick."""

    run: Callable[[GpuRun], Part]
    expected: tuple[int, int]


STAGES = {
    "build": GpuStage(build, (60, 60)), "smoke": GpuStage(smoke, (20, 20)), "tests": GpuStage(tests, (70, 70)),
    "sanitize": GpuStage(sanitize, (120, 120)), "bench": GpuStage(bench, (280, 65)),
    "profile": GpuStage(profile, (45, 45)), "tune": GpuStage(tune, (240, 120)),
}  # fmt: skip


def perform(name: str, gpu: GpuRun) -> Part:
    """Runs one stage and says how long it took. A mistake in it costs the stage, and not those that follow."""
    start = time.monotonic()
    try:
        part = STAGES[name].run(gpu)
    except Exception:
        part = {"passed": False, "failures": {name: traceback.format_exc()}}
    return {**part, "seconds": round(time.monotonic() - start)}
