"""The kernels' side of gpu-check, run here: packing, runner, oracle, small launches and timing, all on the emulator."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from instantrt.plugins.weight_only_gemm import layout, semantics
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.tools.gpu import bench, choices, gemm, ncu, profile, race, roofs, small, tables, tune
from instantrt.tools.gpu.gemm import GUARD, Gemm, HungRowError, pack, random_weight
from instantrt.tools.gpu.layers import TUNED, parse_format
from instantrt.tools.gpu.library import LaunchRefusedError, Library
from instantrt.tools.gpu.small import WIDTHS
from tests.compiler.tensorrt_stand_in import HostDevice
from tests.plugins.kernels import Emulated
from tests.plugins.truth import check, exact

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "DEVICE", "cpu")
    monkeypatch.setattr(gemm, "device_numbers", lambda: {"sm": 90, "sm_count": 4})


@pytest.mark.parametrize(("bits", "activation_bits"), WIDTHS)
@pytest.mark.parametrize("gated", [0, 1])
def test_runner_and_oracle(emulated: dict[int, Emulated], gated: int, bits: int, activation_bits: int) -> None:
    weight = random_weight(48, 192, bits, 64, torch.bfloat16, bias=True)
    for m in (3, 33):
        options = {"activation_bits": activation_bits, "gated": gated, "activation": 1, "wide": 1, "sm": 80}
        check(Gemm(emulated[90].library, torch.randn(m, 192).bfloat16(), weight, options), 2e-5, 1e-5)


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_the_oracle_is_the_reference(activation_bits: int) -> None:
    weight = random_weight(48, 192, 8, 64, torch.float16, bias=True)
    x, options = torch.randn(5, 192).half(), {"gated": 1, "activation": 2, "activation_bits": activation_bits}
    attrs = OP.attributes({**options, "bits": 8, "group": 64})
    assert weight.bias is not None
    arrays = (x.numpy(), weight.codes.numpy(), weight.affine.numpy().reshape(3, -1), weight.bias.numpy())
    for ours, theirs in zip(exact(x, weight, options), semantics.exact(*arrays, attrs), strict=True):
        assert np.allclose(ours.numpy(), theirs, rtol=1e-12)


def test_wrong_results_and_stray_writes_are_seen(emulated: dict[int, Emulated]) -> None:
    weight = random_weight(48, 192, 4, 64, torch.float16)
    prepared = Gemm(emulated[90].library, torch.randn(3, 192).half(), weight, {})
    weight.affine[1, 7, 0] *= 1.01
    prepared()
    weight.affine[1, 7, 0] /= 1.01
    prepared.library = SilentLibrary()  # type: ignore[assignment]
    with pytest.raises(AssertionError, match=r"elements off|relative error"):
        check(prepared, 4e-4, 2.0**-10)
    prepared.y_memory[GUARD - 1] = 0
    with pytest.raises(AssertionError, match="bytes around y were written"):
        prepared.output()


class SilentLibrary:
    def launch(self, *_: object) -> None:
        """Leaves what an earlier launch wrote."""


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (144, 1120), (256, 192), (272, 96)])
def test_packing_in_torch_is_the_products_own(n: int, k: int, bits: int) -> None:
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    ours, theirs = pack(codes, bits).numpy(), layout.pack(codes.numpy(), bits)
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("zeros", ["float", "integer", "central", "low", "high"])
def test_random_weights_are_what_they_are_called(zeros: str) -> None:
    weight = random_weight(144, 512, 4, 64, torch.float16, zeros)
    scale, zero = weight.affine.double().unbind(-1)
    assert 0 < int((scale == 0).sum()) < 100  # dead groups
    whole = bool((zero == zero.round()).all())
    assert whole == (zeros != "float")
    ends = {"central": (8, 8), "low": (0, 0), "high": (15, 15)}
    if zeros in ends:
        assert (float(zero.min()), float(zero.max())) == ends[zeros]
    else:
        assert float(zero.min()) < 6
        assert float(zero.max()) > 9
    assert set(weight.natural.unique().tolist()) == set(range(16))


def test_a_row_that_hung_is_not_launched(emulated: dict[int, Emulated], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random_weight(48, 192, 4, 64, torch.float16), torch.randn(20, 192).half()
    kernel = "ring32_ampere"  # which both SMs have
    rows = {"row": emulated[90].library.rows().index(kernel) + 1}
    monkeypatch.setattr(gemm, "HUNG", frozenset({f"{kernel} sm=90"}))
    with pytest.raises(HungRowError, match=kernel):
        Gemm(emulated[90].library, x, weight, rows)
    assert (
        Gemm(emulated[90].library, x, weight, {**rows, "sm": 80}).plan.kernel == kernel
    )  # another library's hung, not this


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small launches of a small K: the emulator takes its time."""
    monkeypatch.setattr(small, "K", 384)
    monkeypatch.setattr(small, "COMMON", {**small.COMMON, "k": 384})
    monkeypatch.setattr(small, "GROUPS", (32, 96, 384))
    small.weights.cache_clear()


@pytest.mark.usefixtures("shallow")
def test_small_launches_reach_every_row_of_the_table(emulated: dict[int, Emulated]) -> None:
    library = emulated[90].library
    cases = small.every_case(library, {"sm": 90, "sm_count": 132})
    kernels = {plan for plan in library.rows() if not plan.endswith("_turing")} - {"dense"}
    assert {case.split()[0] for case in cases} == kernels
    formats = {(p["bits"], p["activation_bits"], p["type"]) for p in (small.parse(case)[1] for case in cases)}
    assert len(formats) == 2 * 2 * 2
    turing = small.every_case(emulated[75].library, {"sm": 75, "sm_count": 40}, (0,))
    assert {case.split()[0] for case in turing} >= {"tile32_turing", "int8_tile32_turing", "dense"}
    few = small.few_cases(cases)
    assert {case.split()[0] for case in few} == kernels
    assert 2 * len(kernels) <= len(few) <= len(cases) / 8


@pytest.mark.usefixtures("shallow")
def test_small_launches_are_checked(emulated: dict[int, Emulated], capsys: pytest.CaptureFixture[str]) -> None:
    library, device = emulated[90].library, HostDevice()
    cases = small.every_case(library, {"sm": 90, "sm_count": 132}, (1,))
    first = {case.split()[0]: case for case in reversed(cases) if " m=3 " in case}
    for case in first.values():
        assert small.run(library, device, small.parse(case)[1], poisoned=True).max() < small.EXACT / 10
    assert not device.driver.blocks
    small.check(library, device, first["plain"].replace("bits=4", "bits=8", 1), poisoned=False)
    assert '"outcome": "passed"' in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "run", lambda *_: np.array([np.nan, 1e-7]))
        small.check(library, device, first["plain"], poisoned=True)
    assert '"failed", "message": "relative error nan, allowed 2e-05"' in capsys.readouterr().out
    _, problem = small.parse(
        next(case for case in cases if "ring8_ampere" in case and " bits=4 " in case and "group=32" in case)
    )
    assert small.run(library, device, problem, poisoned=True).max() < small.EXACT / 10
    codes, affine, _ = small.weights(4, 32, 1)
    affine[1, 6] *= 1.01  # the kernel reads this; the truth is of what it was
    assert small.run(library, device, problem, poisoned=True).max() > small.EXACT
    assert codes.any()
    small.weights.cache_clear()


class Graph:
    """A CUDA graph of calls on this CPU."""

    def __init__(self, calls: list[race.Call], count: int) -> None:
        self.calls = [calls[i % len(calls)] for i in range(count)]

    def replay(self) -> None:
        for call in self.calls:
            call()


@pytest.fixture
def timed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing without a GPU: the clock counts calls, so that the first row tried wins."""
    ticks = iter(range(1, 1 << 30))

    def timed(call: race.Call) -> float:
        call()
        return float(next(ticks))

    monkeypatch.setattr(bench, "LAYERS", {"qwen2-7b o": (32, 128)})
    for module in (bench, tune):
        monkeypatch.setattr(module, "copies", lambda size: 2)
    monkeypatch.setattr(race, "FEWEST_CALLS", 2)
    monkeypatch.setattr(race, "WARM", 0)
    monkeypatch.setattr(tune, "REPLAYS", 1)
    monkeypatch.setattr(tune, "SPLITS", (0, 2))
    monkeypatch.setattr(race, "capture", Graph)
    monkeypatch.setattr(race, "timed", timed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.usefixtures("timed_here")
def test_a_case_of_the_benchmark(emulated: dict[int, Emulated], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "REPLAYS", 2)
    done = bench.case(emulated[90].library, "qwen2-7b o", 17)
    names = [t["kernel"] for t in done["timings"]]
    assert names[:10] == [
        "int4 g128", "int4 g128 symmetric", "int4 g128 bf16", "int4 g64", "int4 g32", "int8", "int8 g128", "a8w8",
        "a8w8 g128", "a8w4 g128",
    ]  # fmt: skip
    assert {"cublas fp16", "cublas bf16"} <= set(names)
    weights = done["timings"][0]["bytes"] - 17 * (32 + 128) * 2
    assert weights == 32 * 128 // 2 + 32 * 4
    assert not [name for name in done["failures"] if name.startswith(("int4", "int8", "a8"))]
    assert all(t["median"] > 0 and t["plan"] for t in done["timings"][:10])


@pytest.mark.usefixtures("timed_here")
def test_a_quick_case_makes_its_few_formats_once(
    emulated: dict[int, Emulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "REPLAYS", 2)
    right, formats = random_weight, []

    def noted(n: int, k: int, bits: int, group: int, dtype: torch.dtype, zeros: str = "float") -> gemm.Weight:
        formats.append((bits, group))
        return right(n, k, bits, group, dtype, zeros)

    monkeypatch.setattr(bench, "random_weight", noted)
    bench.made_of.cache_clear()
    for m in (1, 17):
        done = bench.case(emulated[90].library, "qwen2-7b o", m, quick=True)
        names = {t["kernel"] for t in done["timings"]} | set(done["failures"])
        assert names <= set(bench.QUICK_KERNELS)
        assert {"int4 g128", "int8", "a8w8", "cublas fp16"} <= {t["kernel"] for t in done["timings"]}
    assert {"torch scaled_mm fp8", "triton int4"} <= names
    assert formats == [(4, 128), (8, 128)]


@pytest.mark.usefixtures("timed_here")
def test_what_compiles_for_each_shape_has_cases_of_its_own(emulated: dict[int, Emulated]) -> None:
    done = bench.case(emulated[90].library, "qwen2-7b o humming", 4, quick=True)
    assert [t["kernel"] for t in done["timings"]] == ["int4 g128 again"]
    assert list(done["failures"]) == ["humming int4"]
    assert done["failures"]["humming int4"].startswith("ModuleNotFoundError")


def test_fp8_weights_have_a_scale_for_each_row() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10, 100, 0, 1e-3]).view(
        5, 1
    )
    values, scale = bench.fp8(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.shape == (5, 1)
    assert bool(((values.float() * scale - x).abs() <= x.abs() * 2**-4 + scale * 2**-10).all()), "or of subnormals"


def test_each_profiled_case_is_numbered_and_launched_once(
    emulated: dict[int, Emulated], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    monkeypatch.setattr(profile, "LAYERS", {"qwen2-7b gate_up": (32, 128), "qwen2-7b o": (32, 128)})
    monkeypatch.setattr(profile, "kernel", lambda reader, name, blocks: lambda: done.append(f"{name} {blocks}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: done.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: done.append("stop"))
    right = profile.prepare

    def prepare(library: Library, name: str) -> race.Call:
        call = right(library, name)
        return lambda: (call(), done.append("call"))

    monkeypatch.setattr(profile, "prepare", prepare)
    cases = [case for case in ncu.CASES if not case.endswith("m=512")]
    monkeypatch.setattr("sys.argv", ["profile", str(emulated[90].library.path), "reader", *cases])
    profile.main()
    assert capsys.readouterr().out.count('"outcome": "passed"') == len(cases)
    each = len(done) // len(cases)
    for i, case in enumerate(cases):
        number = f"empty {ncu.CASES.index(case) + 1}"
        assert done[i * each : (i + 1) * each] == [number, "call", "call", "start", number, "call", "stop"]


@pytest.mark.usefixtures("timed_here")
def test_tuning_tries_every_row_and_a_library_takes_the_fastest(emulated: dict[int, Emulated], tmp_path: Path) -> None:
    library = emulated[90].library
    rows = tune.case(library, (*TUNED, "a8w4 g32"), "32x128", 4)
    tried = {row["format"]: {r["plan"] for r in rows if r["format"] == row["format"]} for row in rows}
    for name, plans_tried in tried.items():
        bits, group, activation_bits = parse_format(name)
        fields = {"m": 4, "n": 32, "k": 128, "group": group or 128, "bits": bits, "activation_bits": activation_bits}
        plans = library.plans((0, 2), **fields, **gemm.device_numbers())
        older = [plan for plan in plans if tune.OLDER in plan.kernel]
        split = {bench.label(plan) for plan in older if plan.splits > 1}
        assert plans_tried == {bench.label(plan) for plan in plans} | {f"{each} by memory" for each in split}
        assert split
        assert len(plans) > 1
    assert all(sum(r.get("chosen", False) for r in rows if r["format"] == name) == 1 for name in tried)
    assert not any("wrong" in row for row in rows)
    assert {r["format"] for r in tables.losses(rows)} == {*TUNED, "a8w4 g32"}

    own = Library(Path(shutil.copy(library.path, tmp_path / "own.so")))
    mine = [row for row in rows if row["format"] == "int4 g128"]
    slow = next(row for row in mine[::-1] if "/" in row["plan"] and "by memory" not in row["plan"])
    slow["us"], mine[-1]["us"] = 0.2, 0.3
    mine += [{**slow, "plan": f"{slow['plan']} by memory", "us": 0.1}, {**slow, "plan": "broken", "wrong": "by 1"}]
    (tmp_path / "own.choices").write_text(choices.choices_file(rows + mine, "H200", "abc"))
    problem = {"n": 32, "k": 128, "group": 128, "bits": 4, "activation_bits": 16, **gemm.device_numbers()}
    assert [bench.label(own.choose(**problem, m=m)) for m in (1, 4)] == [slow["plan"]] * 2
    assert bench.label(library.choose(**problem, m=4)) != slow["plan"]
    lines = (tmp_path / "own.choices").read_text().splitlines()
    assert lines[:2] == ["# measured on H200, commit abc", f"# {choices.COLUMNS}"]
    assert len(lines) == 2 + 4, "int8 by channel is int8 in groups of 128 here"


@pytest.mark.usefixtures("timed_here")
def test_a_row_that_computes_something_else_cannot_win(
    emulated: dict[int, Emulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, broken = Library.launch, "ring32_ampere"

    def launch(self: Library, problem: dict[str, int], tensors: dict[str, int], stream: int = 0) -> None:
        if self.rows()[problem["row"] - 1] != broken:
            right(self, problem, tensors, stream)

    monkeypatch.setattr(Library, "launch", launch)
    rows = tune.case(emulated[90].library, ("int4 g128",), "32x128", 4)
    assert {row["plan"].split("/")[0] for row in rows if "wrong" in row} == {broken}
    assert not any(row["plan"].startswith(broken) for row in rows if "us" in row)


@pytest.mark.usefixtures("timed_here")
def test_a_row_that_cannot_be_launched_costs_itself(
    emulated: dict[int, Emulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Library.launch

    def launch(self: Library, problem: dict[str, int], tensors: dict[str, int], stream: int = 0) -> None:
        if self.rows()[problem["row"] - 1] == "ring32_ampere":
            raise LaunchRefusedError("too many resources requested for launch")
        right(self, problem, tensors, stream)

    monkeypatch.setattr(Library, "launch", launch)
    rows = tune.case(emulated[90].library, ("int4 g128",), "32x128", 4)
    assert {row["wrong"] for row in rows if row["plan"].startswith("ring32_ampere")} == {
        "LaunchRefusedError: too many resources requested for launch"
    }
    assert any(row["plan"].startswith("ring8_ampere") and row["us"] for row in rows)


@pytest.mark.usefixtures("timed_here")
def test_few_rows_are_also_timed_from_the_cache(emulated: dict[int, Emulated]) -> None:
    done = bench.case(emulated[90].library, "qwen2-7b o", 4)
    plans = {t["kernel"]: t["plan"] for t in done["timings"]}
    assert plans["int4 g128 cached"] == plans["int4 g128"]
    assert "torch int8pack bf16" in plans
    assert not [name for name in done["failures"] if name.startswith(("int4", "int8", "a8"))]


def test_facts_that_cannot_be_had_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(roofs, "biased_errors", lambda: {"0": 1e-7})
    found = roofs.facts(Path("no such library"))
    assert found["biased codes, error"] == {"0": 1e-7}
    assert found["sums of split K, us"].startswith("OSError: no such library")


def test_the_launch_of_a_graph_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, name: str) -> None:
            self.name = name

        def record(self) -> None:
            done.append(self.name)

        def synchronize(self) -> None:
            done.append(f"wait for {self.name}")

        def elapsed_time(self, other: Event) -> float:
            return 0.25 if (self.name, other.name) == ("start", "stop") else 0.0

    monkeypatch.setattr(race, "pair", lambda: (Event("start"), Event("stop")))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("busy"))
    assert race.timed(lambda: done.append("call")) == 250
    assert done == ["busy", "start", "call", "stop", "wait for stop"]


def test_who_is_hopelessly_slow_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "timed", lambda call: call())
    graphs: dict[str, race.Call] = {"best": lambda: 1.0, "near": lambda: 2.9, "far": lambda: 3.1}
    times = race.replay_in_turn(graphs, 9, 3)
    assert {name: len(each) for name, each in times.items()} == {"best": 9, "near": 9, "far": 2}
    assert {len(each) for each in race.replay_in_turn(graphs, 9).values()} == {9}


def test_graphs_exceed_the_cache() -> None:
    for size in (1 << 20, 6 << 20, 17 << 20, 235 << 20):
        assert size * race.copies(size) >= min(64 * size, 256 << 20)
    calls: list[race.Call] = [lambda: None] * 2
    assert race.calls_in_graph(race.Contestant("slow", calls, 0, 0, floor_us=900.0)) == 3
    assert race.calls_in_graph(race.Contestant("quick", calls, 0, 0, floor_us=2.0)) == 32
    assert race.calls_in_graph(race.Contestant("many copies", calls * 24, 0, 0, floor_us=2.0)) == 48
