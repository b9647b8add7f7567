"""How long a compilation takes: the parts speed, depth, engine and large of `instantrt bench compile`.

Every time is that of a fresh process of the real command line, as a user starts it. What is compared takes turns.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array
from instantrt.tools.bench.results import Result
from instantrt.tools.bench.synthetic import QWEN2_7B, SMOLLM2_135M, sized, write_checkpoint
from instantrt.tools.cli.console import console
from instantrt.tools.markdown import table

ROOM = 30e9  # bytes: Qwen2-7B's checkpoint, and one artifact of it
SCRATCH, MODEL = "SCRATCH", "MODEL"  # in the words of a command: a folder that a round begins empty; the checkpoint
GOALS = {
    "x86 a16w8, cold": "12 s, CPU 15 s",
    "x86 a16w4, warm": "5 s",
    "cold, 80 layers : 30": "1.3 x",
    "warm, 80 layers : 30": "1.3 x",
    "sm89 a16w8, a build kit": "8 s",
    "x86 a16w8": "60 s, 1000 MB",
}

# The peak of a child begins with what its parent held when it started it: this parent holds next to nothing.
LAUNCH = """
import json, os, sys, time
started = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, used = os.wait4(child, 0)
seconds = time.perf_counter() - started
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""
STAGE = re.compile(r"^ *(\d+\.\d+) s +\d+%  (.+?)(?= /| \d|$)", re.MULTILINE)  # up to a path or a number
VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"


@dataclass(frozen=True)
class Side:
    """A command that is timed, and where its cache of exports is, if it is ours."""

    words: tuple[str, ...]
    cache: str = ""


@dataclass(frozen=True)
class Peer:
    """Another exporter: its package, and what its interpreter is told, step by step."""

    package: str
    steps: Mapping[str, str]


PEERS = {
    "genai": Peer(
        "onnxruntime-genai",
        {"int8": "-m onnxruntime_genai.models.builder -m MODEL -o SCRATCH/genai -p int8 -e cpu -c SCRATCH/hub"},
    ),
    "optimum": Peer(
        "optimum-onnx",
        {
            "float32": "-m optimum.commands.optimum_cli export onnx --model MODEL"
            " --task text-generation-with-past SCRATCH/optimum",
            "then int8": "-m optimum.commands.optimum_cli onnxruntime quantize --onnx_model SCRATCH/optimum"
            " --avx2 -o SCRATCH/int8",
        },
    ),
}


def measured(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> Array:
    """Wall seconds, CPU seconds, and the peak memory of the largest process in MB: of a command and what it starts."""
    launch = [sys.executable, "-c", LAUNCH, *words]
    with log.open("wb") as said:
        done = subprocess.run(launch, env=os.environ | environment, stdout=subprocess.PIPE, stderr=said, check=True)
    status, wall, cpu, peak = json.loads(done.stdout)
    if status:
        raise UserError("a command that is timed failed", where=shlex.join(words), found=log.read_text()[-2000:])
    return np.array([wall, cpu, peak / 1024])


def commands_in_turns(sides: Mapping[str, Side], rounds: int, folder: Path) -> tuple[dict[str, Array], Result]:
    """What is `measured` of each side [rounds, 3], and a row for each."""
    used: dict[str, list[Array]] = {name: [] for name in sides}
    stages: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for turn in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            for name, side in sides.items():
                words = [word.replace(SCRATCH, scratch) for word in side.words]
                environment = {"HF_HUB_OFFLINE": "1", "INSTANTRT_CACHE": side.cache.replace(SCRATCH, scratch)}
                used[name].append(measured(words, folder / "log", environment))
                for seconds, stage in STAGE.findall((folder / "log").read_text()):
                    stages[name].setdefault(stage, []).append(float(seconds))
                console.print(f"{name}, {turn + 1} of {rounds}: {used[name][-1][0]:.1f} s")
    arrays = {name: np.array(turns) for name, turns in used.items()}
    rows = {name: row(name, each) for name, each in arrays.items()}
    for name, found in stages.items():
        rows[name]["stages"] = {stage: round(float(np.median(turns)), 2) for stage, turns in found.items()}
    return arrays, rows


def our_side(model: Path, options: str, cache: str) -> Side:
    """`instantrt compile`; sides of one `cache` share it."""
    out = f"{SCRATCH}/{cache} {model.name} {options}"
    command = (sys.executable, "-m", "instantrt", "compile", str(model), "--target", *options.split(), "-o", out)
    return Side(command, f"{SCRATCH}/{cache}")


def row(name: str, used: Array, unit: str = "s") -> Result:
    """Quartiles of a side [rounds, 3], with the most memory, or of a ratio [rounds, 2]."""
    wall, cpu, *peak = np.percentile(used, (25, 50, 75), axis=0).round(2).T.tolist()
    memory = {"peak_mb": round(used[:, 2].max())} if peak else {}
    return {"goal": GOALS.get(name, ""), "unit": unit, "wall": wall, "cpu": cpu, **memory}


def ratio(name: str, over: Array, under: Array) -> dict[str, Result]:
    return {name: row(name, over[:, :2] / under[:, :2], "x")}


def versions(python: str, package: str, *others: str) -> str:
    """Of `package` and others, where `python` is the interpreter."""
    names = (package, *others)
    done = subprocess.run([python, "-c", VERSIONS, *names], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{package} is not there", where=python, found="".join(done.stderr.strip().splitlines()[-1:]))
    return ", ".join(map(" ".join, zip(names, done.stdout.split(), strict=True)))


def speed(folder: Path, rounds: int, peers: Mapping[str, Path | None]) -> Result:
    """A Llama of 135 M random weights in 30 layers, cold, then warm, and other exporters on the same checkpoint.

    Cold: nothing is cached. Warm: another format of the same model, with the cache that the cold one left. Ours are
    quantized and ran once, against their twins; optimum compares its float32 export with PyTorch, genai nothing.
    """
    given = [(PEERS[name], str(python)) for name, python in peers.items() if python is not None]
    pythons = [(sys.executable, "instantrt"), *((python, peer.package) for peer, python in given)]
    found = [versions(*each, "torch", "transformers", "onnxruntime") for each in pythons]
    model = folder / "model"
    write_checkpoint(model, SMOLLM2_135M, tokenizer=True)
    cold, warm = "x86 a16w8, cold", "x86 a16w4, warm"
    sides = {cold: our_side(model, "x86 --quant a16w8", "cache"), warm: our_side(model, "x86 --quant a16w4", "cache")}
    for peer, python in given:
        for step, text in peer.steps.items():
            words = (word.replace(MODEL, str(model)) for word in text.split())
            sides[f"{peer.package}, {step}"] = Side((python, *words))
    used, rows = commands_in_turns(sides, rounds, folder)
    for peer, _ in given:
        every = np.sum([used[f"{peer.package}, {step}"] for step in peer.steps], axis=0)
        rows |= ratio(f"{peer.package}, all : ours, cold", every, used[cold])
    for name in (name for name, python in peers.items() if python is None):
        rows[PEERS[name].package] = {"not_measured": f"--{name} was not given"}
    return {"rows": rows, "versions": found}


def depth(folder: Path, rounds: int) -> Result:
    """80 layers against 30, both 64 wide: what a layer costs beside its weights."""
    layers = (30, 80)
    for count in layers:
        write_checkpoint(folder / str(count), sized(SMOLLM2_135M, 64, 128, count, 4, 2, 1000))
    sides = {
        f"{start}, {count} layers": our_side(folder / str(count), f"x86 --quant {quant}", "cache")
        for start, quant in (("cold", "a16w8"), ("warm", "a16w4"))
        for count in layers
    }
    used, rows = commands_in_turns(sides, rounds, folder)
    for start in ("cold", "warm"):
        rows |= ratio(f"{start}, 80 layers : 30", used[f"{start}, 80 layers"], used[f"{start}, 30 layers"])
    return {"rows": rows}


def engine(folder: Path, rounds: int) -> Result:
    """The Llama of 135 M for sm89, cold: a build kit is all of our work, an engine that and TensorRT-RTX's build."""
    model = folder / "model"
    write_checkpoint(model, SMOLLM2_135M)
    sides = {
        "sm89 a16w8, a build kit": our_side(model, "sm89 --quant a16w8 --builder kit", "kit"),
        "sm89 a16w8, an engine": our_side(model, "sm89 --quant a16w8 --builder tensorrt-rtx", "engine"),
    }
    return {"rows": commands_in_turns(sides, rounds, folder)[1]}


def large(folder: Path) -> Result:
    """Qwen2-7B's shape, 15.2 GB of random bfloat16 weights, cold; each once."""
    model = folder / "model"
    write_checkpoint(model, QWEN2_7B)
    rows: Result = {}
    # Not of one round: the disk has one artifact at a time.
    for name in ("x86 a16w8", "x86 a16w8 --no-smoke"):
        side = our_side(model, name.replace("a16w8", "--quant a16w8"), "cache")
        rows |= commands_in_turns({name: side}, 1, folder)[1]
    return {"rows": rows}


def check_room(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        found = f"{free / 1e9:.0f} GB in {folder}"
        raise UserError("no room for `large`", found=found, expected=f"{ROOM / 1e9:.0f} GB", fix="--scratch FOLDER")


def part_table(result: Result) -> list[str]:
    """Markdown of one part: the rows, then what is known of them."""
    lines: list[tuple[str, ...]] = []
    known = [f"* {line}" for line in result.get("versions", ())]
    for name, each in result["rows"].items():
        if "not_measured" in each:
            lines.append((name, "", f"not measured: {each['not_measured']}", "", ""))
            continue
        wall, cpu = (shown(each[key], each["unit"]) for key in ("wall", "cpu"))
        lines.append((name, each["goal"], wall, cpu, f"{each['peak_mb']} MB" if "peak_mb" in each else ""))
        stages = [f"{stage} {seconds:.1f} s" for stage, seconds in each.get("stages", {}).items() if seconds >= 0.05]
        known += [f"* {name}: {', '.join(stages)}"] if stages else []
    rows = table(("what", "goal", "wall", "CPU", "peak memory"), lines)
    return [*rows, "", *known] if known else rows


def shown(quartiles: Sequence[float], unit: str) -> str:
    low, middle, high = quartiles
    return f"{middle:.4g} {unit}" + (f" ({low:.4g} to {high:.4g})" if low < high else "")


def plot(result: Result, path: Path) -> None:
    """The median round's wall time of each side of `speed`, ours by stage, with the quartiles as whiskers."""
    from matplotlib.figure import Figure

    sides = {name: each for name, each in result["rows"].items() if each.get("unit") == "s"}
    low, middle, high = zip(*(each["wall"] for each in sides.values()), strict=True)
    figure = Figure(figsize=(9, 2.2 + 0.45 * len(sides)), layout="constrained")
    axes = figure.subplots()
    spread = np.abs(np.array([low, high]) - middle)
    bars = axes.barh(list(sides), middle, xerr=spread, color="lightgray", ecolor="black")
    axes.bar_label(bars, [f"{value:.1f} s" for value in middle], padding=8)
    stages = dict.fromkeys(s for each in sides.values() for s, seconds in each["stages"].items() if seconds >= 0.05)
    left = np.zeros(len(sides))
    for index, stage in enumerate(stages):
        widths = np.array([each["stages"].get(stage, 0.0) for each in sides.values()])
        axes.barh(list(sides), widths, left=left, color=f"C{index}", label=stage.removesuffix(" from"))
        left += widths
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axes.set(xlabel="seconds of wall time", title="135 M weights, 30 layers", xlim=(0, 1.15 * max(high)))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
