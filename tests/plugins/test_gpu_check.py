"""The runner of gpu-check, run here: watched children, stages, merging, goals, tables and plot on made-up results."""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from instantrt.tools.gpu import check as gpu_check
from instantrt.tools.gpu import goals, layers, libraries, ncu, predictions, small, stages, tables
from instantrt.tools.gpu.plot import plot, speedup_plot
from instantrt.tools.gpu.race import Timing
from instantrt.tools.gpu.watch import ChildJob, Outcome, failures, run_all
from tests.plugins.kernels import ROOT, Emulated
from tests.plugins.ncu_stand_in import COUNTED, GEMM, raw_page

ROOF = {"read_bytes_per_us": 4e6, "bf16_ops_per_us": 8e8, "int8_ops_per_us": 1.4e9}
CHILD = """
import os, sys, time
from instantrt.tools.gpu.watch import emit
for case in sys.argv[1:]:
    print("loading", case)
    emit(start=case)
    if case == "hangs":
        time.sleep(60)
    if case == "dies":
        print("Segmentation fault")
        os._exit(7)
    if case == "lost":
        emit(end=case, outcome="crashed", message="illegal address")
        sys.exit(3)
    print("========= ERROR SUMMARY: of", case)
    emit(end=case, outcome="failed" if case == "wrong" else "passed", message="off by one", data=len(case))
"""


def child(script: str, cases: list[str], stall: float = 2.0) -> ChildJob:
    return ChildJob(lambda left: [sys.executable, "-c", script, *left], cases, stall)


@pytest.mark.slow
def test_a_case_that_hangs_or_dies_costs_itself() -> None:
    job = child(CHILD, ["good", "hangs", "wrong", "dies", "lost", "last"])
    job.lives = 4
    start = time.monotonic()
    run_all([job], 60, 1)
    assert time.monotonic() - start < 20
    assert {name: o.outcome for name, o in job.outcomes.items()} == {
        "good": "passed", "hangs": "hung", "wrong": "failed", "dies": "crashed", "lost": "crashed", "last": "passed"
    }  # fmt: skip
    assert job.outcomes["hangs"].message.startswith("no sign of life for 2 s\n")
    assert job.outcomes["hangs"].message.endswith("loading hangs")
    assert "status 7" in job.outcomes["dies"].message
    assert "Segmentation fault" in job.outcomes["dies"].message
    assert job.outcomes["lost"].message == "illegal address"
    assert job.outcomes["last"].data == 4
    assert job.said == [f"========= ERROR SUMMARY: of {case}" for case in ("good", "wrong", "last")]
    assert job.status == 7
    assert sorted(failures(job.outcomes.values())) == ["dies", "hangs", "lost", "wrong"]


def test_what_takes_every_child_is_left_alone() -> None:
    job = child(CHILD, ["dies", "lost", "good", "hangs", "wrong", "last"], 1)
    run_all([job], 60, 1)
    assert [job.outcomes[name].outcome for name in ("dies", "lost", "hangs")] == ["crashed", "crashed", "hung"]
    assert [job.outcomes[name].outcome for name in ("wrong", "last")] == ["not run", "not run"]
    assert job.outcomes["good"].outcome == "passed"
    assert job.outcomes["last"].message == "too many of its neighbours were lost"


def test_a_child_that_never_starts_a_case_is_not_tried_again() -> None:
    job = child("import sys; sys.exit('no such library')", ["a", "b"])
    run_all([job], 60, 1)
    assert {o.outcome for o in job.outcomes.values()} == {"not run"}
    assert "never came to it" in job.outcomes["b"].message
    assert "no such library" in job.outcomes["b"].message


@pytest.mark.slow
def test_a_stage_ends_in_time_and_says_what_it_left() -> None:
    jobs = [child(CHILD, ["good", "hangs", "last"], 50), child(CHILD, ["good"])]
    start = time.monotonic()
    run_all(jobs, 3, 1)
    assert time.monotonic() - start < 8
    assert [o.outcome for o in jobs[0].outcomes.values()] == ["passed", "not run", "not run"]
    assert [o.outcome for o in jobs[1].outcomes.values()] == ["not run"]


@pytest.mark.slow
def test_pytest_cases_are_watched(tmp_path: Path) -> None:
    (tmp_path / "test_four.py").write_text(
        "import os, time, pytest\n@pytest.mark.parametrize('w', [4, 8])\ndef test_bits(w):\n    assert w == 4\n"
        "def test_slow():\n    time.sleep(60)\n"
        "def test_no():\n    pytest.skip('why')\ndef test_dies():\n    os._exit(1)\n"
    )
    command = [*stages.PYTEST, "-c", str(ROOT / "pyproject.toml"), f"--rootdir={tmp_path}"]
    status, text = libraries.run([*command, "--collect-only", str(tmp_path / "test_four.py")])
    assert status == 0
    names = stages.collected(text)
    assert [name.partition("::")[2] for name in names] == [
        "test_bits[4]", "test_bits[8]", "test_slow", "test_no", "test_dies"
    ]  # fmt: skip
    paths = {name: f"{tmp_path}/{name}" for name in names}
    job = ChildJob(lambda left: [*command, *(paths[name] for name in left)], names, 4)
    run_all([job], 60, 1)
    outcomes = {name.partition("::")[2]: o.outcome for name, o in job.outcomes.items()}
    assert outcomes == {
        "test_bits[4]": "passed", "test_bits[8]": "failed", "test_slow": "hung", "test_no": "skipped",
        "test_dies": "crashed",
    }  # fmt: skip
    assert job.outcomes[names[1]].message.startswith("assert 8 == 4\n")
    assert "why" in job.outcomes[names[3]].message
    part = stages.summary(list(job.outcomes.values()))
    assert part["counts"] == {"passed": 1, "failed": 1, "hung": 1, "skipped": 1, "crashed": 1}
    assert not part["passed"]


LIBCUDA = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned f) { return 0; }
int cuDeviceGet(int* d, int i) { return *d = 0; }
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = c; return 0; }
int cuCtxSetCurrent(void* c) { return 0; }
int cuStreamCreate(void** s, unsigned f) { *s = 0; return 0; }
int cuMemAlloc_v2(uint64_t* p, size_t n) { *p = (uint64_t)aligned_alloc(256, (n + 255) / 256 * 256); return 0; }
int cuMemFree_v2(uint64_t p) { free((void*)p); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t p, void* h, size_t n, void* s) { memcpy((void*)p, h, n); return 0; }
int cuMemcpyDtoHAsync_v2(void* h, uint64_t p, size_t n, void* s) { memcpy(h, (void*)p, n); return 0; }
int cuMemsetD8Async(uint64_t p, unsigned char v, size_t n, void* s) { memset((void*)p, v, n); return 0; }
int cuStreamSynchronize(void* s) { return FAILS; }
"""


def driver(folder: Path, fails: int) -> dict[str, str]:
    """A CUDA driver whose device is this CPU, for children: the environment that finds it."""
    folder.mkdir()
    source = folder / "driver.c"
    source.write_text(LIBCUDA.replace("FAILS", str(fails)))
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", str(source), "-o", str(folder / "libcuda.so.1")], check=True)
    return {"LD_LIBRARY_PATH": str(folder)}


@pytest.mark.slow
def test_smoke_names_rows_that_take_the_gpu_with_them(
    emulated: dict[int, Emulated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = emulated[90].library.path
    cases = small.every_case(emulated[90].library, {"sm": 90, "sm_count": 132}, (0,))
    names = ("plain ", "ring8_ampere ")
    few = [case for case in cases if " m=3 " in case and " group=96 " in case and case.startswith(names)]
    assert len(few) == 4 + 2 * len(small.SPLITS)
    monkeypatch.setattr(stages, "smoke_cases", lambda gpu: [(path, few)])
    monkeypatch.setattr(stages, "FEW_THREADS", driver(tmp_path / "sound", 0))
    gpu = stages.GpuRun(90, True, {})
    gpu.report["smoke"] = stages.perform("smoke", gpu)
    assert gpu.report["smoke"]["counts"] == {"passed": len(few)}, gpu.report["smoke"]["failures"]
    assert gpu.report["smoke"]["passed"]
    assert not gpu.hung_rows
    assert sorted(gpu.report["smoke"]["errors"]) == ["plain sm=90", "ring8_ampere sm=90"]
    assert all(0 < worst < small.EXACT for worst in gpu.report["smoke"]["errors"].values())
    monkeypatch.setattr(stages, "FEW_THREADS", driver(tmp_path / "broken", 700))
    gpu.report["smoke"] = stages.perform("smoke", gpu)
    assert gpu.report["smoke"]["counts"] == {"crashed": 2 * 3, "not run": len(few) - 2 * 3}
    assert gpu.hung_rows == ["plain sm=90", "ring8_ampere sm=90"]
    assert gpu.environment["INSTANTRT_HUNG_ROWS"] == "plain sm=90,ring8_ampere sm=90"
    assert "cuStreamSynchronize failed with CUDA error 700" in tables.text("smoke", gpu.report["smoke"])


def timing(kernel: str, layer: str, m: int, median: float, size: int = 36_000_000, flops: int = 1) -> dict[str, Any]:
    row = {"kernel": kernel, "layer": layer, "m": m, "median": median, "bytes": size, "flops": flops}
    return tables.with_floor(row, ROOF)


def test_floors() -> None:
    stream = timing("int4 g128", "70b o", 1, 10.0, 36_000_000, 134_000_000)
    assert (stream["floor_us"], stream["fraction"]) == (9.0, 0.9)
    assert timing("a8w8", "70b o", 2048, 400.0, 10**8, 280 * 10**9)["floor_us"] == pytest.approx(200)
    assert timing("int8", "70b o", 2048, 400.0, 10**8, 280 * 10**9)["floor_us"] == pytest.approx(350)


def test_failures_of_one_reason_are_one_line() -> None:
    outcomes = [Outcome(f"m={m}", "not run", "the time was up") for m in (1, 2, 3)]
    outcomes += [Outcome("m=8", "crashed", "status 1\nTraceback\n  File\nRuntimeError: illegal address")]
    part = {**stages.summary(outcomes), "seconds": 1}
    assert tables.text("tune", part).splitlines()[1:] == [
        "  m=8: crashed: status 1 ... RuntimeError: illegal address",
        "  m=1 and 2 more: not run: the time was up",
    ]
    long = failures([Outcome("x", "failed", "start" + "." * 5000 + "the end")])["x"]
    assert len(long) < 900
    assert long.startswith("failed: start")
    assert long.endswith("the end")


def verdict(timings: list[dict[str, Any]], words: str) -> list[goals.Judgement]:
    judged = (v for name, found in goals.judge(timings).items() if words in name for v in found)
    return sorted(judged, key=lambda v: v.m)


def test_goals_are_met_up_to_their_limit() -> None:
    limit = 9 / 0.85 + 2
    for took, met in ((limit - 1e-6, True), (limit + 1e-3, False)):
        (found,) = verdict([timing("int4 g128", "70b o", 1, took)], "within floor")
        assert (found.met, found.layer, found.m) == (met, "70b o", 1)
        assert found.limit == pytest.approx(limit)
    tall = [timing("int8", "down", 1, 20.0), timing("int8", "down", 16, 21.5)]
    (found,) = verdict(tall, "16 rows within 5 % of one")
    assert (found.limit, found.met) == (21.0, False)
    against = [timing("int4 g128", "70b o", m, 10.0) for m in (1, 64, 512)]
    against += [timing("cublas fp16", "70b o", m, us) for m, us in ((1, 28.0), (64, 19.9), (512, 9.1))]
    assert [(v.m, v.met) for v in verdict(against, "x cuBLAS fp16")] == [(1, True), (64, False), (512, True)]


def test_goals_ask_only_what_they_name() -> None:
    small_layer = [timing("int4 g128", "o", 1, 3.0, 5_000_000), timing("cublas fp16", "o", 1, 7.0)]
    asked = [name for name, found in goals.judge(small_layer).items() if found]
    assert asked == ["int4 g128 2.0 x cuBLAS fp16 to 16 rows, up to 16 MB"]
    between = [timing("int4 g128", "x", 1, 3.0, 21_000_000), timing("cublas fp16", "x", 1, 7.0)]
    assert not verdict(between, "")
    assert not verdict([timing("a8w8", "o", 512, 3.0)], "")  # its reference was not timed
    many = [timing(k, "o", m, 10.0) for k in ("a8w8", "cublas bf16") for m in (1, 256, 512, 2048)]
    assert [v.m for v in verdict(many, "a8w8 1.5 x")] == [512, 2048]
    zeros = [timing("int4 g128", "o", 1, 10.3), timing("int4 g128 symmetric", "o", 1, 10.0)]
    assert [v.met for v in verdict(zeros, "float zeros")] == [False]


def test_goal_table() -> None:
    timings = [timing("int4 g128", layer, 1, took) for layer, took in (("a", 10.0), ("b", 13.0), ("c", 12.8))]
    lines = goals.goal_table(goals.judge(timings))
    assert len(lines) == len(goals.GOALS)
    assert lines[0].startswith("MISSED        int4 g128 within floor")
    assert lines[0].endswith("1 of 3; b m=1 took 13.00 us, limit 12.59 us".removesuffix(" us"))
    assert lines[1].startswith("not measured  int8 within floor")
    names = {k for t in goals.GOALS for k in (t.kernel, t.reference)} - {goals.FLOOR, goals.ONE_ROW}
    assert names <= {*bench_names(), "cublas fp16", "cublas bf16", "torch int_mm"}


def bench_names() -> set[str]:
    source = (ROOT / "tools/gpu/bench.py").read_text()
    return {line.split('"')[1] for line in source.splitlines() if line.startswith('        "')}


def test_losses_of_the_table() -> None:
    def row(plan: str, us: float, chosen: bool = False, m: int = 1) -> dict[str, Any]:
        return {"format": "int8", "layer": "o", "m": m, "plan": plan, "us": us, "chosen": chosen}

    rows = [row("tile64", 5.0, True), row("stream8/2", 4.0), row("wgmma64", 6.0), row("tile64", 3.0, True, 16)]
    rows += [{"format": "int8", "layer": "o", "m": 1, "plan": "broken", "wrong": "relative error 0.5"}]
    worst, none = tables.losses(rows)
    assert (worst["chosen"], worst["best"], worst["best_us"], worst["loss"]) == ("tile64", "stream8/2", 4.0, 0.25)
    assert (none["m"], none["loss"]) == (16, 0)
    only = tables.losses([*rows, row("stream8", 1.0, m=64)])
    assert (only[0]["m"], only[0]["chosen"]) == (64, "not run")
    lines = tables.tune_table(rows)
    assert lines[0] == "WRONG int8 o m=1 broken: relative error 0.5"
    assert lines[2].split() == ["int8", "o", "1", "tile64", "5.00", "stream8/2", "4.00", "25%"]


PARTS = ("o", "qkv", "gate_up", "down")


def test_cases_name_layer_and_rows() -> None:
    assert [layers.parse_case(name) for name in layers.cases(True)[:2]] == [
        ("qwen2-7b gate_up", 1), ("qwen2-7b gate_up", 8)
    ]  # fmt: skip
    assert len(layers.cases(False)) == len(layers.LAYERS) * len(layers.ROWS)
    assert set(layers.cases(True)) < set(layers.cases(False))
    assert layers.cases(True, ("16x128",))[0] == "16x128 m=1"
    assert layers.size("16x128") == (16, 128)
    assert layers.size("70b o") == (8192, 8192)
    assert set(layers.QUICK) == {f"{model} {part}" for model in ("qwen2-7b", "llama3-8b") for part in PARTS}
    for case in ncu.CASES:
        layer, m = layers.parse_case(case.partition(", ")[2])
        assert layer in layers.LAYERS
        assert m in layers.ROWS


def report() -> dict[str, Any]:
    """As the stages leave it."""
    timings = [
        timing(kernel, layer, m, 9 * factor + m / 64, m * 10**9)
        for layer in layers.LAYERS
        for m in layers.ROWS
        for kernel, factor in (("int4 g128", 1.3), ("cublas fp16", 4.0), ("humming int4", 2.0), ("a8w8", 1.5))
    ]
    roof = {**ROOF, "read_bytes_per_us_by_mb": {"6": 2e6}, "empty_node_us": 1.2}
    outcome = [asdict(Outcome("x", "passed"))]
    return {
        "before": {"name": "a GPU"},
        "bench": {
            "passed": True, "seconds": 7, "counts": {"passed": len(outcome)}, "roofs": roof, "timings": timings,
            "absent": {"70b o m=1, humming int8": "ModuleNotFoundError: no humming"},
        },
    }  # fmt: skip


def test_what_is_printed_is_short_and_what_is_written_whole() -> None:
    part = report()["bench"]
    long, short = tables.text("bench", part), tables.text("bench", part, 45)
    assert sum(line.startswith("70b gate_up") for line in long.splitlines()) == 4
    assert len(long.splitlines()) > len(layers.LAYERS) * 4
    assert len(short.splitlines()) < 40
    assert "  humming int8: ModuleNotFoundError: no humming" in short.splitlines()
    assert short.splitlines()[-len(goals.GOALS)].startswith(("met", "MISSED"))
    assert "empty node              1.200 us" in short


def test_timings_outlive_the_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = [asdict(Timing("70b o", 1, kernel, 10.0, 9.0, 11.0, 36_000_000, 1)) for kernel in ("int4 g128", "a8w8")]
    done = [Outcome("70b o m=1", "passed", data={"timings": timings, "failures": {"humming int4": "none"}})]
    roofs = Outcome("roofs", "passed", data={**ROOF, "read_bytes_per_us_by_mb": {}, "empty_node_us": 1.0})
    monkeypatch.setattr(stages.GpuRun, "library", lambda gpu, suffix: Path(f"libraries/{suffix}"))  # minutes of nvcc
    monkeypatch.setattr(stages, "measure", lambda *_: [*done, roofs, Outcome("facts", "passed", data={"biased": 1})])
    part = stages.perform("bench", stages.GpuRun(90, True, {}))
    assert part["passed"]
    assert [t["floor_us"] for t in part["timings"]] == [9.0, 9.0]
    assert "  biased: 1" in tables.text("bench", part).splitlines()
    monkeypatch.setattr(stages, "measure", lambda *_: [*done, Outcome("roofs", "hung")])
    part = stages.perform("bench", stages.GpuRun(90, True, {}))
    assert not part["passed"]
    assert part["timings"] == timings
    assert "70b o             int4 g128               10.00" in tables.text("bench", part).splitlines()


def test_tune_leaves_the_file_for_beside_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = {
        "format": "int8",
        "layer": "70b o",
        "m": 8,
        "plan": "ring8/2",
        "us": 9.0,
        "chosen": True,
        "device": [90, 132],
    }
    done = [Outcome("70b o m=8", "passed", data=[row]), Outcome("70b o m=16", "hung")]
    monkeypatch.setattr(stages, "measure", lambda *_: done)
    gpu = stages.GpuRun(90, True, {"gpu": "H200", "commit": "abc"}, out=tmp_path / "h200.json")
    part = stages.perform("tune", gpu)
    assert "  measured choices: h200.choices" in tables.text("tune", part).splitlines()
    said = (tmp_path / "h200.choices").read_text().splitlines()
    assert said[0] == "# measured on H200, commit abc"
    assert said[2:] == ["90 132 8 8192 16 8192 8192 8 ring8 2"]
    done[:] = done[1:]
    assert "choices" not in stages.perform("tune", gpu), "of nothing there is none"


def test_a_stage_with_a_mistake_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "measure", lambda *_: 1 / 0)
    part = stages.perform("tune", stages.GpuRun(90, True, {}))
    assert tables.text("tune", part).endswith("ZeroDivisionError: division by zero")


def test_a_program_that_is_absent_has_failed() -> None:
    status, said = libraries.run(["no-such-program"])
    assert status
    assert "no-such-program" in said


def test_plot(tmp_path: Path) -> None:
    made = report()
    for count in (1, 3, 8):
        some = list(layers.LAYERS)[:count]
        timings = [t for t in made["bench"]["timings"] if t["layer"] in some]
        plot({**made, "timings": timings}, tmp_path / f"{count}.png")
        speedup_plot({**made, "timings": timings}, tmp_path / f"{count}_speedup.png")
        for name in (f"{count}.png", f"{count}_speedup.png"):
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_stages_add_up_only_for_one_source(tmp_path: Path) -> None:
    identity = {"commit": "c", "sources": "s", "gpu": "g"}
    out = tmp_path / "h200.json"
    assert gpu_check.earlier(out, identity) == identity
    gpu_check.write(out, json.dumps({**identity, "smoke": {"passed": True}}))
    assert gpu_check.earlier(out, identity)["smoke"] == {"passed": True}
    for name in identity:
        other = {**identity, name: "other"}
        assert gpu_check.earlier(out, other) == other
    out.write_text("{half")
    assert gpu_check.earlier(out, identity) == identity
    assert not list(tmp_path.glob("*.partial"))


def test_sources_are_told_apart(tmp_path: Path) -> None:
    kernel = tmp_path / "plugins" / "weight_only_gemm" / "tiles.cu"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("one")
    first = gpu_check.sources(tmp_path)
    assert gpu_check.sources(tmp_path) == first
    kernel.write_text("two")
    assert gpu_check.sources(tmp_path) != first
    assert len(gpu_check.sources()) == len(first)


def test_stages_run_in_their_order_and_build_first() -> None:
    assert gpu_check.parse_stages("tests,smoke") == ["build", "smoke", "tests"]
    assert gpu_check.parse_layers("4096x14336,16x128") == ("4096x14336", "16x128")
    for wrong in ("", "4096", "4096x", "8x128", "16x64", "0x128", "16x128,", "70b o", "-16x128"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected NxK, as 4096x14336"):
            gpu_check.parse_layers(wrong)
    assert gpu_check.parse_formats("int4 g32,a8w8") == ("int4 g32", "a8w8")
    formats = ("int4", (4, 0, 16)), ("int8 g96", (8, 96, 16)), ("a8w4 g128", (4, 128, 8)), ("a8w8", (8, 0, 8))
    assert all(layers.parse_format(name) == fields for name, fields in formats)
    for wrong in ("", "int5", "int4 g48", "int4 g0", "int4 128", "fp8", "int4,", "a16w4"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected int4, int8, a8w4 or a8w8"):
            gpu_check.parse_formats(wrong)
    with pytest.raises(Exception, match="unknown test; expected build,smoke,tests,sanitize,bench,profile,tune"):
        gpu_check.parse_stages("test")


def test_short_runs_fit_their_commands() -> None:
    for name, plan in gpu_check.PARTS.items():
        assert plan.stages[0] == "build"
        assert plan.seconds < 600
        assert sum(stages.STAGES[stage].expected[plan.quick] for stage in plan.stages) <= plan.seconds, name
    assert gpu_check.PARTS["first"].seconds < 360
    gpu = stages.GpuRun(90, True, {}, native=True, deadline=time.monotonic() + 100)
    assert gpu.seconds(30) == 30
    assert 90 < gpu.seconds(1000) <= 100
    assert stages.GpuRun(90, True, {}, deadline=time.monotonic() - 1).seconds(30) == 0


def test_of_one_gpu_alone_only_its_library_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(libraries, "cmake", lambda out, *_: made.append(out.parent.name) or "")
    monkeypatch.setattr(libraries, "nvcc", lambda out, *_: made.append(out.parent.name) or "no nvcc")
    gpu = stages.GpuRun(90, True, {}, native=True)
    assert stages.perform("build", gpu)["failures"] == {"reader": "no nvcc"}
    assert sorted(made) == ["native", "reader"]
    assert gpu.library() == stages.FOLDER / "native" / "libinstantrt_kernels.so"
    assert gpu.library("_80") is None
    assert gpu.library("reader") is None


def test_counters_of_nsight_compute() -> None:
    kernels = ncu.parse(raw_page([("<unnamed>::nothing()", "(3, 1, 1)", {}), (GEMM, "(592, 1, 1)", COUNTED)]))
    assert [kernel["grid"] for kernel in kernels] == ["(3, 1, 1)", "(592, 1, 1)"]
    assert not kernels[0]["counters"]
    found = ncu.by_case(kernels)
    assert list(found) == [ncu.CASES[2]]
    row = ncu.summarize(ncu.CASES[2], found[ncu.CASES[2]][0])
    assert row["us"] == pytest.approx(21.504)
    assert row["GB/s"] == pytest.approx(3214)
    assert row["smem KB"] == pytest.approx(99.33)
    assert (row["dram%"], row["regs"], row["occ%"], row["tensor%"]) == (81.25, 76, None, None)
    assert row["stalls"] == [["long_scoreboard", 6, 0.6], ["math_pipe_throttle", 2.25, 0.225], ["wait", 1.5, 0.15]]
    head, line = ncu.table([row])
    assert line.split()[:2] == ["int4", "g128,"]
    assert "gemm<" in line
    assert line.endswith("long_scoreboard 6.0 (60%), math_pipe_throttle 2.2 (22%), wait 1.5 (15%)")
    assert head.index("us") + 2 == line.index("21.50") + 5
    assert ncu.parse("==ERROR== The user does not have permission to access NVIDIA GPU Performance Counters\n") == []


NCU = """import sys
sys.path.insert(0, ROOT)
from tests.plugins.ncu_stand_in import main
main(MODE, sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "lost"), [("sound", 0), ("no such metric", 0), ("dies", 1), ("hangs", 1)])
def test_a_profile_loses_only_the_case_that_dies(
    mode: str, lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "ncu"
    script = NCU.replace("ROOT", repr(str(ROOT))).replace("MODE", repr(mode))
    tool.write_text(f"#!{sys.executable}\n{script}")
    tool.chmod(0o755)
    monkeypatch.setattr(ncu, "executable", lambda: str(tool))
    monkeypatch.setattr(stages, "FOLDER", tmp_path)
    monkeypatch.setattr(stages, "PROFILE_STALL", 4 if mode == "hangs" else 50)
    monkeypatch.setattr(stages.GpuRun, "library", lambda gpu, suffix="": Path(f"libraries/{suffix}"))
    part = stages.perform("profile", stages.GpuRun(90, True, {}, out=tmp_path / "h100.json"))
    cases = [row["case"] for row in part["profiled"]]
    assert cases == [case for case in ncu.CASES if not (lost and case == ncu.CASES[3])], part["failures"]
    assert sorted(part["failures"]) == ncu.CASES[3 : 3 + lost]
    assert part["passed"] == (not lost)
    text = tables.text("profile", part)
    assert text.count("long_scoreboard 6.0") == len(cases)
    assert "every counter: h100.ncu.csv.gz" in text
    assert b"gpu__time_duration.sum" in gzip.decompress((tmp_path / "h100.ncu.csv.gz").read_bytes())


def test_a_profile_without_nsight_compute_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ncu, "executable", lambda: None)
    monkeypatch.setattr(stages.GpuRun, "library", lambda gpu, suffix="": Path(f"libraries/{suffix}"))
    part = stages.perform("profile", stages.GpuRun(90, True, {}))
    assert "ncu, Nsight Compute, is not on PATH" in tables.text("profile", part)
    assert not part["passed"]


def test_a_prediction_is_compared_on_its_gpu() -> None:
    gate_up = {"layer": "qwen2-7b gate_up", "bytes": 72_000_000}
    timings = [
        {**gate_up, "kernel": "int4 g128", "m": 1, "median": 30.0},
        {**gate_up, "kernel": "int8", "m": 1, "median": 40.0},
        {**gate_up, "kernel": "int4 g128", "m": 512, "median": 200.0},
        {**gate_up, "kernel": "cublas fp16", "m": 512, "median": 180.0},
    ]  # fmt: skip
    rows = predictions.compare(timings, 3e6, "NVIDIA H100 80GB HBM3")
    found = {(r["kernel"], r["m"], r["of"]): (round(r["measured"], 6), round(r["off"], 3)) for r in rows}
    assert found == {
        ("int4 g128", 1, predictions.BEFORE): (0.8, 0.0),
        ("int4 g128", 1, predictions.RING): (0.8, -0.111),
        ("int8", 1, predictions.BEFORE): (0.6, -0.333),
        ("int4 g128", 512, predictions.BEFORE): (0.9, 0.0),
    }
    lines = predictions.comparison_table(rows)
    assert [line.split(",")[0] for line in lines if "OFF BY OVER 20%" in line] == ["int8 qwen2-7b gate_up m=1"]
    assert predictions.compare(timings, 4.3e6, "NVIDIA H200")[0]["predicted"] == [0.6, 0.75]
    assert not predictions.compare(timings, 3e6, "NVIDIA A100")
    assert predictions.off(5.5, (4.5, 5.0)) == pytest.approx(0.1)
    known = {layer for p in predictions.PREDICTIONS for layer in p.layers}
    assert known <= set(layers.LAYERS)
    assert {p.kernel for p in predictions.PREDICTIONS} <= bench_names()


def test_a_peer_that_is_absent_is_named_loudly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages.GpuRun, "library", lambda gpu, suffix="": Path(f"libraries/{suffix}"))
    asked: list[str] = []
    monkeypatch.setattr(stages, "measure", lambda gpu, module, cases, *_: asked.extend(cases) or [])
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: None)
    part = stages.perform("bench", stages.GpuRun(90, True, {}))
    assert "!! humming-kernels, a peer, cannot be imported" in capsys.readouterr().out
    assert "humming: humming-kernels, a peer, cannot be imported" in tables.text("bench", part)
    assert not [case for case in asked if "humming" in case]
    monkeypatch.setattr(stages, "humming_absent", lambda: "")
    stages.perform("bench", stages.GpuRun(90, True, {}))
    assert [case for case in asked if "humming" in case] == stages.COMPILED[True]


def test_what_is_done_is_written_when_the_command_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(gpu: stages.GpuRun) -> dict[str, Any]:
        assert (gpu.quick, gpu.native, gpu.sm) == (True, True, 90)
        assert 345 - 45 - 5 < gpu.deadline - time.monotonic() <= 345 - 45  # the next stage's own time is kept
        raise KeyboardInterrupt

    answers = {gpu_check.QUERY: {"name": "NVIDIA H100"}, "compute_cap": {"compute_cap": "9.0"}}
    monkeypatch.setattr(gpu_check, "query", answers.__getitem__)
    bad = stages.GpuStage(lambda gpu: {"passed": True, "profiled": "no rows"}, (60, 60))
    good = stages.GpuStage(lambda gpu: stages.summary([Outcome("x", "passed")]), (60, 60))
    for name, stage in {"build": good, "smoke": bad, "bench": stages.GpuStage(killed, (280, 110))}.items():
        monkeypatch.setitem(stages.STAGES, name, stage)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--part", "first", "--out", str(tmp_path / "h100")])
    written = json.loads((tmp_path / "h100.json").read_text())
    assert [name for name in stages.STAGES if name in written] == ["build", "smoke"]
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("== smoke: no table: TypeError") for line in said)
    assert said[0].startswith("NVIDIA H100: expected build 60 s, smoke 60 s, bench 110 s, profile 45 s; together 275 s")
    assert [line.split()[1] for line in said if line.startswith("-- ")] == ["build", "smoke", "bench"]


@pytest.mark.skipif(
    shutil.which("nvidia-smi") is not None, reason="this machine has a GPU: run instantrt gpu-check itself"
)
def test_without_a_gpu_it_says_so() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "instantrt.tools.gpu.check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.startswith("no GPU: nvidia-smi is not on PATH.")
