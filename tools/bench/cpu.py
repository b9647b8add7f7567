"""The CPU road beside its peers: `instantrt bench cpu [MODEL]` writes benchmarks/cpu.json, cpu.md and cpu.png.

MODEL is the folder of a causal LM, or of an encoder (model_type bert, say), which torch exports to ONNX first. With
--shape it is random weights in a known model's shape: speed alone. Peers run where they are installed, each in a Python
that is named; what a peer's own tool made of the model is kept in --scratch, ours is compiled anew.

Every configuration is a process that holds its model and is told to do one measurement at a time (cpu_worker.py), so
that the others wait, and whatever else the machine does meets all of them: ratios are of one round.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from instantrt.compiler.accuracy.data import read_text, tokenizer_of
from instantrt.compiler.checkpoint import read_json
from instantrt.passes.core.errors import UserError
from instantrt.tools.bench.compile_time import TOKENIZER, measured, shown, versions
from instantrt.tools.bench.running import quartiles
from instantrt.tools.bench.synthetic import QWEN2_05B, QWEN2_15B, write_checkpoint
from instantrt.tools.cli.console import console

Result = dict[str, Any]
Ask = Callable[..., Any]  # a worker's measurement and its arguments -> the value
ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "cpu.json"
WORKER, GGUF = (str(Path(__file__).with_name(f"cpu_{name}.py")) for name in ("worker", "gguf"))
MIB = 1 << 20
STARTS = 3  # processes that are started to see how long loading takes
WINDOW = 512  # tokens that see one another, for the loss
BATCH = (8, 128)  # rows and tokens that an encoder is given
SENTENCES = 100
SHAPES = {"0.5b": QWEN2_05B, "1.5b": QWEN2_15B}
PACKAGES = {"llama": "llama-cpp-python", "genai": "onnxruntime-genai", "openvino": "openvino"}
MODEL, MADE = "MODEL", "MADE"  # in the words of a command: what is compiled; the folder that it fills


@dataclass(frozen=True)
class Form:
    """What one configuration runs.

    python   ours, or the flag that names a peer's
    kind     of worker
    words    what makes it, told to that Python
    entry    what the worker opens, in the folder that was made
    files    a pattern of those that it reads there: its bytes on disk
    bits     of most weights
    """

    python: str
    kind: str
    words: tuple[str, ...]
    entry: str
    files: str
    bits: int


def ours(options: str, bits: int, kind: str = "ours") -> Form:
    command = ("-m", "instantrt", "compile", MODEL, "--target", "x86", "--no-smoke", *options.split(), "-o", MADE)
    return Form("ours", kind, command, "", "x86/model.onnx*", bits)


def llama(kind: str, bits: int) -> Form:
    return Form("llama", "llama", (GGUF, MODEL, f"{MADE}/model.gguf", kind), "model.gguf", "model.gguf", bits)


def genai(options: str, bits: int) -> Form:
    builder = f"-m onnxruntime_genai.models.builder -e cpu -c {MADE}/hub -m"
    return Form("genai", "genai", (*builder.split(), MODEL, "-o", MADE, *options.split()), "", "model.onnx*", bits)


def openvino(options: str, bits: int) -> Form:
    export = "-m optimum.commands.optimum_cli export openvino --task text-generation-with-past --model"
    words = (*export.split(), MODEL, *options.split(), MADE)
    return Form("openvino", "openvino", words, "", "openvino_model.*", bits)


def of_encoder(python: str, kind: str, code: str, bits: int) -> Form:
    return Form(python, kind, ("-c", code, MODEL, MADE), "model.onnx", "model.onnx*", bits)


EXPORT = """
import sys
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager").eval()
names = ["input_ids", "attention_mask", "token_type_ids"]
sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=512)}
feeds = {name: torch.ones(2, 8, dtype=torch.int64) for name in names}
shapes = dict.fromkeys(names, sizes)
program = torch.onnx.export(model, (), kwargs=feeds, dynamic_shapes=shapes, input_names=names,
                            output_names=["hidden"], opset_version=18, dynamo=True, verbose=False)
program.save(sys.argv[2] + "/model.onnx", external_data=True)
"""
COPY = """
import shutil, sys
from pathlib import Path
for path in Path(sys.argv[1]).parent.glob("model.onnx*"):
    shutil.copyfile(path, Path(sys.argv[2], path.name))
"""
DYNAMIC = """
import sys
from onnxruntime.quantization import QuantType, quantize_dynamic
quantize_dynamic(sys.argv[1], sys.argv[2] + "/model.onnx", per_channel=True, weight_type=QuantType.QInt8)
"""

PREFILL, DECODE, DECODE_LONG, DECODE_BATCH = "prefill 512", "decode after 128", "decode after 1024", "8 rows after 128"
ENCODE = "8 x 128"
FLOAT = "float32"


@dataclass(frozen=True)
class Goal:
    """A ratio of two measurements of a round, each of a configuration: at least so much is wanted."""

    least: float
    over: tuple[str, str]
    under: tuple[str, str]


@dataclass(frozen=True)
class Contest:
    """What is run, what each is asked for, and what is wanted.

    first    what a fresh process does after loading, before its peak memory is read
    rounds   name -> what a worker is asked: the tokens a second
    bases    (measurement, bits) -> what it is compared with, where that is there; bits None: any
    limits   on our 8 bits: (what, at most)
    loss     what it is, where it is measured
    speed    the measurement that the plot shows
    """

    forms: Mapping[str, Form]
    first: tuple[str | int, ...]
    rounds: Mapping[str, tuple[str | int, ...]]
    bases: Mapping[tuple[str, int | None], str]
    speed: str
    goals: tuple[Goal, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    loss: str = ""


Q8, Q4, OV8 = "llama.cpp Q8_0", "llama.cpp Q4_0", "OpenVINO int8"
EIGHT, EXACT, FOUR = "8 bits", "8 bits, exact", "4 bits"
PEERS = {
    Q8: llama("Q8_0", 8),
    Q4: llama("Q4_0", 4),
    "genai int8": genai("-p int8", 8),
    "genai int4": genai("-p int4", 4),
    OV8: openvino("--weight-format int8", 8),
}
BASES = {(measure, bits): base for measure in (DECODE, DECODE_LONG, DECODE_BATCH) for bits, base in ((8, Q8), (4, Q4))}
DECODER = Contest(
    forms={
        FLOAT: ours("--quant none", 32),
        EIGHT: ours("--quant a16w8", 8),
        EXACT: ours("--quant a16w8 --cpu-preset exact", 8),
        "A8W8": ours("--quant a8w8", 8),
        FOUR: ours("--quant a16w4", 4),
        "4 bits, exact": ours("--quant a16w4 --cpu-preset exact", 4),
        **PEERS,
        "llama.cpp Q4_K_M": llama("Q4_K_M", 4),
        "OpenVINO int4": openvino("--weight-format int4 --group-size 32", 4),
    },
    first=("prefill", 512),
    rounds={
        PREFILL: ("prefill", 512),
        DECODE: ("decode", 128),
        DECODE_LONG: ("decode", 1024),
        DECODE_BATCH: ("decode", 128, 8),
    },
    bases=BASES | {(PREFILL, None): OV8},
    speed=DECODE,
    goals=(
        Goal(1.25, (EIGHT, DECODE), (Q8, DECODE)),
        Goal(1.25, (EIGHT, DECODE_LONG), (Q8, DECODE_LONG)),
        Goal(1.1, (FOUR, DECODE), (Q4, DECODE)),
        Goal(1.1, (FOUR, DECODE_LONG), (Q4, DECODE_LONG)),
        Goal(0.9, (EIGHT, PREFILL), (OV8, PREFILL)),
        Goal(0.8, (EXACT, DECODE), (EIGHT, DECODE)),
        Goal(5, (EIGHT, DECODE_BATCH), (EIGHT, DECODE)),
    ),
    limits={
        "loss over float32": 0.004,
        "MiB on disk": 140,
        "peak memory : bytes on disk": 1.6,
        "s to first token": 0.3,
    },
    loss="nats a token",
)
SHAPE_PREFILL = "prefill 128"
SHAPE = Contest(
    forms={EIGHT: ours("--quant a16w8", 8), FOUR: ours("--quant a16w4", 4), **PEERS},
    first=("prefill", 128),
    rounds={SHAPE_PREFILL: ("prefill", 128), DECODE: ("decode", 128)},
    bases=BASES | {(SHAPE_PREFILL, None): OV8},
    speed=DECODE,
    goals=tuple(Goal(1, (EIGHT, DECODE), (name, DECODE)) for name, form in PEERS.items() if form.bits == 8),
)
DYNAMIC_INT8 = "quantize_dynamic int8 per channel"
ENCODER = Contest(
    forms={
        FLOAT: of_encoder("ours", "onnx encoder", COPY, 32),
        "A16W8": ours("--quant a16w8", 8, "our encoder"),
        "A16W8, exact": ours("--quant a16w8 --cpu-preset exact", 8, "our encoder"),
        "A8W8": ours("--quant a8w8", 8, "our encoder"),
        "A16W4": ours("--quant a16w4", 4, "our encoder"),
        DYNAMIC_INT8: of_encoder("ours", "onnx encoder", DYNAMIC, 8),
        "OpenVINO float": of_encoder("openvino", "openvino encoder", COPY, 32),
    },
    first=("batch",),
    rounds={ENCODE: ("batch",)},
    bases={(ENCODE, None): FLOAT},
    speed=ENCODE,
    goals=(
        Goal(1 / 0.9, ("A8W8", ENCODE), (DYNAMIC_INT8, ENCODE)),
        Goal(1.5, ("A16W8, exact", ENCODE), (FLOAT, ENCODE)),
    ),
    loss="1 - cosine of mean-pooled vectors to float32, mean over 100 sentences",
)
CONTESTS = {"decoder": DECODER, "shape": SHAPE, "encoder": ENCODER}


@contextmanager
def working(python: str, form: Form, made: Path, inputs: Path, idle: list[float]) -> Iterator[Ask]:
    """A worker; `idle` gets the seconds of CPU that it used before each measurement, while it waited."""
    words = [python, WORKER, form.kind, str(made / form.entry), str(inputs)]
    log = made.with_suffix(".log")
    with log.open("wb") as said:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(*request: str | int) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            value, used = json.loads(process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            found = log.read_text(errors="replace")[-2000:]
            raise UserError("a measurement failed", where=f"{made.name}: {request}", found=found) from None
        idle.append(used)
        return value

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def make(form: Form, python: str, model: Path, made: Path) -> None:
    """Fills the folder `made`, whole or not at all; what a peer made before is kept."""
    if made.is_dir() and form.python != "ours":
        return
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        part = Path(scratch, "made")
        part.mkdir()
        words = [
            word.replace(MODEL, str(model)) if word == MODEL else word.replace(MADE, str(part)) for word in form.words
        ]
        measured([python, *words], made.with_suffix(".log"), {"HF_HUB_OFFLINE": "1"})
        shutil.rmtree(made, ignore_errors=True)
        part.rename(made)


def contest(kind: str, model: Path, inputs: Path, folder: Path, pythons: Mapping[str, str], rounds: int) -> Result:
    """All that is measured of a model; `folder` gets what is made of it."""
    plan = CONTESTS[kind]
    forms = {name: form for name, form in plan.forms.items() if form.python in pythons}
    made = {name: folder / re.sub(r"\W+", "-", name) for name in forms}
    for name, form in forms.items():
        console.print(f"making {name}")
        make(form, pythons[form.python], model, made[name])
    idle: list[float] = []

    def worker(name: str) -> Any:
        return working(pythons[forms[name].python], forms[name], made[name], inputs, idle)

    sides: dict[str, Result] = {}
    for name, form in forms.items():
        sides[name] = {"bits": form.bits, "bytes": sum(path.stat().st_size for path in made[name].glob(form.files))}
        sides[name] |= starts(plan, partial(worker, name))
        console.print(name, sides[name])
    if plan.loss:
        measure_loss(sides, worker, folder / "vectors.npy" if kind == "encoder" else None)
    with ExitStack() as stack:
        asks = {name: stack.enter_context(worker(name)) for name in forms}
        for name, ask in asks.items():
            ask("load")
            sides[name]["rounds"] = {measure: [] for measure in plan.rounds}
        for turn in range(rounds + 1):
            for name, ask in asks.items():
                for measure, request in plan.rounds.items():
                    value = ask(*request)
                    if turn:  # the first warms up
                        sides[name]["rounds"][measure].append(round(value, 2))
            console.print(f"round {turn} of {rounds}")
    return {
        "kind": kind,
        "sides": sides,
        "versions": [versions(pythons["ours"], "instantrt", "onnxruntime"), *(
            versions(python, PACKAGES[name]) for name, python in pythons.items() if name in PACKAGES
        )],
        "not_given": sorted({form.python for form in plan.forms.values()} - set(pythons)),
        "idle_cpu_s": round(max(idle), 3),
    }  # fmt: skip


def starts(plan: Contest, worker: Callable[[], Any]) -> Result:
    """Of fresh processes: quartiles of the seconds to a first token, the most memory after one more measurement."""
    seconds, peaks = [], []
    for _ in range(STARTS):
        with worker() as ask:
            seconds.append(ask("load"))
            ask(*plan.first)
            peaks.append(ask("peak"))
    return {"first_s": quartiles(np.array(seconds)), "peak_mb": round(max(peaks))}


def measure_loss(sides: Mapping[str, Result], worker: Callable[[str], Any], vectors: Path | None) -> None:
    """Adds the loss of each side, of a process of its own: that of a causal LM, or from an encoder's `vectors`."""
    base = None
    for name, side in sides.items():
        with worker(name) as ask:
            if vectors is None:
                side["loss"] = round(ask("nll", WINDOW), 4)
                continue
            ask("load")
            ask("vectors", str(vectors))
            found = np.load(vectors).astype(np.float64)
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        base = found if base is None else base  # float32 is the first
        cosine = (found * base).sum(1)
        side |= {"loss": round(1 - cosine.mean(), 6), "least_cosine": round(cosine.min(), 5)}


def write_inputs(kind: str, model: Path, text: Path, path: Path) -> None:
    """What workers are fed: token ids [S] of the text; for an encoder a batch of it, and sentences with their masks."""
    tokenizer, words = tokenizer_of(model), read_text(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = np.array(tokenizer.encode(words, add_special_tokens=False).ids, np.int64)
    wanted = math.prod(BATCH) if kind == "encoder" else WINDOW
    if kind != "encoder":
        wanted = max(int(request[1]) for request in CONTESTS[kind].rounds.values()) + 64
    if len(ids) < wanted:
        raise UserError("the text is too short", where=str(text), expected=f"{wanted} tokens", found=str(len(ids)))
    arrays: dict[str, Any] = {"ids": ids}
    if kind == "encoder":
        sentences = [tokenizer.encode(s).ids[: BATCH[1]] for s in re.split(r"(?<=[.?!])\s+", words)[:SENTENCES]]
        arrays["batch"] = ids[: math.prod(BATCH)].reshape(BATCH)
        arrays["sentences"] = np.array([each + [0] * (BATCH[1] - len(each)) for each in sentences], np.int64)
        arrays["mask"] = np.array([[1] * len(each) + [0] * (BATCH[1] - len(each)) for each in sentences], np.int64)
    np.savez(path, **arrays)


def ratios(sides: Mapping[str, Result], over: tuple[str, str], under: tuple[str, str]) -> list[float] | None:
    """Quartiles of (configuration, measurement) : (configuration, measurement), round by round."""
    if over[0] not in sides or under[0] not in sides:
        return None
    first, second = (np.array(sides[name]["rounds"][measure]) for name, measure in (over, under))
    return quartiles(first / second)


def markdown(results: Mapping[str, Result]) -> str:
    lines = ["# CPU artifacts beside their peers", "", "Written by `instantrt bench cpu`.", "", ABOUT, ""]
    if any(CONTESTS[result["kind"]].loss for result in results.values()):
        lines += [f"![loss against speed]({OUT.with_suffix('.png').name})", ""]
    for name, result in results.items():
        lines += [f"## {name}", "", *table(result), "", *wanted_table(result)]
        lines += [f"* {line}" for line in result["versions"]]
        lines += [f"* not measured: `--{flag}` was not given" for flag in result["not_given"]]
        lines += [f"* a waiting process used at most {result['idle_cpu_s']} s of CPU between two measurements", ""]
    return "\n".join(lines)


ABOUT = """Two threads each. Speeds are tokens a second, medians of the rounds; behind them, as ratios within a round
with their quartiles: against llama.cpp's form of as many bits, prefill against OpenVINO int8, encoders against float32.
A decoded token is given, not sampled; 8 rows are one batch, all its tokens counted. The first token: from nothing but
imports to the logits behind a prompt of 8 tokens and one more. Peak memory: of a process after a prompt, what it maps
included. Bytes: what is read of the weights and the graph. The loss of a causal LM is of `examples/text/bench.txt`, or
of `--text`, in windows of 512 tokens."""


def table(result: Result) -> list[str]:
    """A row for each configuration."""
    plan, sides = CONTESTS[result["kind"]], result["sides"]
    names = ["", *plan.rounds, "first token", "peak memory", "on disk", *([plan.loss] if plan.loss else [])]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for name, side in sides.items():
        cells = [name, *(speed_cell(plan, sides, name, measure) for measure in plan.rounds)]
        cells += [f"{side['first_s'][1]:.2f} s", f"{side['peak_mb']} MB", f"{side['bytes'] / MIB:.0f} MiB"]
        least = f" (worst cosine {side['least_cosine']})" if "least_cosine" in side else ""
        cells += [f"{side['loss']:.4g}{least}" if least else f"{side['loss']:.4f}"] if plan.loss else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def speed_cell(plan: Contest, sides: Mapping[str, Result], name: str, measure: str) -> str:
    cell = f"{np.median(sides[name]['rounds'][measure]):.4g}"
    if measure == ENCODE:
        cell += f" ({1e3 * math.prod(BATCH) / np.median(sides[name]['rounds'][measure]):.1f} ms)"
    bits = sides[name]["bits"]
    base = plan.bases.get((measure, None)) or plan.bases.get((measure, bits))
    ratio = ratios(sides, (name, measure), (base, measure)) if base not in (None, name) else None
    return f"{cell}; {shown(ratio, 'x')}" if ratio else cell


def wanted_table(result: Result) -> list[str]:
    """What is wanted, and what was measured."""
    plan, sides = CONTESTS[result["kind"]], result["sides"]
    lines = []
    for goal in plan.goals:
        if ratio := ratios(sides, goal.over, goal.under):
            over, under = (", ".join(each) for each in (goal.over, goal.under))
            lines.append(f"| {over} : {under} | at least {goal.least:.3g} | {shown(ratio, 'x')} |")
    for what, most in plan.limits.items():
        lines.append(f"| {EIGHT}: {what} | at most {most:g} | {LIMITED[what](sides):.4g} |")
    return ["| what | goal | measured |", "|---|---|---|", *lines, ""] if lines else []


LIMITED: Mapping[str, Callable[[Mapping[str, Result]], float]] = {
    "loss over float32": lambda sides: sides[EIGHT]["loss"] - sides[FLOAT]["loss"],
    "MiB on disk": lambda sides: sides[EIGHT]["bytes"] / MIB,
    "peak memory : bytes on disk": lambda sides: sides[EIGHT]["peak_mb"] * MIB / sides[EIGHT]["bytes"],
    "s to first token": lambda sides: sides[EIGHT]["first_s"][1],
}


def plot(results: Mapping[str, Result], path: Path) -> None:
    """Loss against speed, a bubble's area the bytes on disk; the line joins those that none beats in both."""
    from matplotlib.figure import Figure

    drawn = {name: result for name, result in results.items() if CONTESTS[result["kind"]].loss}
    if not drawn:
        return
    figure = Figure(figsize=(10, 5.5 * len(drawn)), layout="constrained")
    for axes, (name, result) in zip(np.atleast_1d(figure.subplots(len(drawn))), drawn.items(), strict=True):
        plan, sides = CONTESTS[result["kind"]], result["sides"]
        speeds = {each: float(np.median(side["rounds"][plan.speed])) for each, side in sides.items()}
        frontier: list[str] = []
        for each in sorted(sides, key=lambda each: -speeds[each]):
            if not frontier or sides[each]["loss"] < sides[frontier[-1]]["loss"]:
                frontier.append(each)
        axes.plot([speeds[f] for f in frontier], [sides[f]["loss"] for f in frontier], color="lightgray", zorder=0)
        largest = max(side["bytes"] for side in sides.values())
        for each, side in sides.items():
            python = plan.forms[each].python
            color = f"C{['ours', *PACKAGES].index(python)}"
            axes.scatter(speeds[each], side["loss"], 2000 * side["bytes"] / largest, color, alpha=0.4)
            label = f"{each}, {side['bytes'] / MIB:.0f} MiB"
            axes.annotate(label, (speeds[each], side["loss"]), ha="center", va="center", fontsize="small")
        axes.set(title=name, xlabel=f"tokens a second, {plan.speed}", ylabel=plan.loss)
        axes.margins(0.12)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def keep(results: Mapping[str, Result], out: Path) -> None:
    """Writes all that is known."""
    machine = {"processor": processor(), "cores": os.cpu_count()}
    out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(results))
    plot(results, out.with_suffix(".png"))


def processor() -> str:
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else ""


def prepared(model: Path | None, shape: str | None, folder: Path) -> tuple[str, Path]:
    """The kind of contest, and what is compiled: the checkpoint, random weights, or what torch exported."""
    if (model is None) == (shape is None):
        raise UserError("what is to be measured?", expected="a MODEL, or --shape")
    if model is None:
        assert shape is not None
        model = folder / "checkpoint"
        if not model.is_dir():
            write_checkpoint(model, SHAPES[shape])
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(TOKENIZER / name, model / name)
        return "shape", model
    names = read_json(model / "config.json").get("architectures") or [""]
    if names[0].endswith("ForCausalLM"):
        return "decoder", model
    make(Form("", "", ("-c", EXPORT, MODEL, MADE), "", "", 32), sys.executable, model, folder / "exported")
    return "encoder", folder / "exported" / "model.onnx"


def main(
    model: Annotated[Path | None, typer.Argument(help="folder of a causal LM or of an encoder")] = None,
    shape: Annotated[Literal["0.5b", "1.5b"] | None, typer.Option(help="random weights in Qwen2's shape")] = None,
    text: Annotated[Path, typer.Option(help="English in UTF-8")] = ROOT / "examples" / "text" / "bench.txt",
    llama: Annotated[Path | None, typer.Option(help="a python that has llama-cpp-python and gguf")] = None,
    genai: Annotated[Path | None, typer.Option(help="a python that has onnxruntime-genai")] = None,
    openvino: Annotated[Path | None, typer.Option(help="a python that has openvino, optimum-intel and nncf")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    scratch: Annotated[Path | None, typer.Option(help="keeps what peers made, for the next run")] = None,
    out: Annotated[Path, typer.Option(help="the JSON; .md and .png go beside it")] = OUT,
) -> None:
    """Measure a model in every configuration; the files keep the last results of other models."""
    given = {"llama": llama, "genai": genai, "openvino": openvino}
    pythons = {"ours": sys.executable} | {name: str(python) for name, python in given.items() if python is not None}
    results: dict[str, Result] = json.loads(out.read_text())["results"] if out.is_file() else {}
    with ExitStack() as stack:
        base = scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        name = model.absolute().name if model is not None else f"Qwen2's shape of {shape}, random weights"
        folder = base / re.sub(r"\W+", "-", name)
        folder.mkdir(parents=True, exist_ok=True)
        kind, compiled = prepared(model, shape, folder)
        inputs = folder / "inputs.npz"
        write_inputs(kind, model or compiled, text, inputs)
        results[name] = contest(kind, compiled, inputs, folder, pythons, rounds)
    keep(results, out)
