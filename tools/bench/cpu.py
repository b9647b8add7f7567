"""The CPU road beside its peers: `instantrt bench cpu [MODEL]` writes benchmarks/cpu.json, cpu.md and cpu.png.

MODEL is the folder of a causal LM, or of an encoder (model_type bert, say), which torch exports to ONNX for its peers;
--onnx FILE is one more of them, called by its folder. With --shape it is random weights in a known model's shape: speed
alone. Peers run where they are installed, each in a Python that is named; what a peer's own tool made of the model is
kept in --scratch, ours is compiled anew.

Every configuration is a process that holds its model and is told to do one measurement at a time (cpu_worker.py in
peers), so that the others wait, and whatever else the machine does meets all of them: ratios are of one round.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from instantrt.compiler.accuracy.data import read_text, tokenizer_of
from instantrt.compiler.accuracy.texts import sentences
from instantrt.compiler.json_file import read_json
from instantrt.passes.core.errors import UserError
from instantrt.tools.bench.compile_time import measured, versions
from instantrt.tools.bench.cpu_contests import (
    CALIBRATION,
    CONTESTS,
    EXPORT,
    EXPORTED,
    MADE,
    MODEL,
    PACKAGES,
    Contest,
    Form,
    as_it_comes,
)
from instantrt.tools.bench.cpu_page import markdown, plot
from instantrt.tools.bench.peers.cpu_worker import STEPS
from instantrt.tools.bench.results import Result, keep, known, quartiles
from instantrt.tools.bench.synthetic import QWEN2_05B, QWEN2_15B, write_checkpoint
from instantrt.tools.cli.console import console
from instantrt.tools.places import BENCHMARKS, TEXT

Ask = Callable[..., Any]  # a worker's measurement and its arguments -> the value
OUT = BENCHMARKS / "cpu.json"
WORKER = str(Path(__file__).parent / "peers" / "cpu_worker.py")
STARTS = 3  # processes that are started to see how long loading takes
WINDOW = 512  # tokens that see one another, for the loss
LONGEST = 256  # tokens of a sentence whose vectors are compared
SHAPES = {"0.5b": QWEN2_05B, "1.5b": QWEN2_15B}


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
        process.kill()  # it has nothing to save, and a measurement in progress may be long
        process.communicate()


def make(form: Form, python: str, model: Path, made: Path, calibration: Path | None = None) -> None:
    """Fills the folder `made`, whole or not at all; what a peer made before is kept."""
    if made.is_dir() and form.python in PACKAGES:
        return
    given = {MODEL: str(model), CALIBRATION: str(calibration)}
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        part = Path(scratch, "made")
        part.mkdir()
        words = [given.get(word, word.replace(MADE, str(part))) for word in form.words]
        measured([python, *words], made.with_suffix(".log"), {"HF_HUB_OFFLINE": "1"})
        shutil.rmtree(made, ignore_errors=True)
        part.rename(made)


def measured_model(
    kind: str,
    model: Path,
    tokenized: Path,
    texts: Iterable[Path],
    folder: Path,
    pythons: Mapping[str, str],
    rounds: int,
    calibration: Path | None = None,
    others: Iterable[Path] = (),
) -> Result:
    """All that is measured of a model, and on which machine; `folder` gets what is made of it.

    tokenized   the folder that has the model's tokenizer
    others      ONNX files of the same encoder
    """
    plan, inputs = CONTESTS[kind], folder / "inputs.npz"
    write_inputs(kind, tokenized, texts, inputs)
    load = os.getloadavg()[0]
    known_versions = [
        versions(pythons["ours"], "instantrt", "onnxruntime"),
        *(versions(python, PACKAGES[name]) for name, python in pythons.items() if name in PACKAGES),
    ]
    forms = {name: form for name, form in plan.forms.items() if form.python in pythons}
    forms |= {path.parent.name: as_it_comes(str(path)) for path in others}
    made = {name: folder / re.sub(r"\W+", "-", name) for name in forms}
    for name, form in forms.items():
        console.print(f"making {name}")
        make(form, pythons[form.python], model, made[name], calibration)
    idle: list[float] = []

    def worker(name: str) -> Any:
        return working(pythons[forms[name].python], forms[name], made[name], inputs, idle)

    sides: dict[str, Result] = {}
    for name, form in forms.items():
        sides[name] = {"bits": form.bits, "bytes": sum(path.stat().st_size for path in made[name].glob(form.files))}
        sides[name] |= starts(plan, partial(worker, name)) if plan.first else {}
        console.print(name, sides[name])
    if kind == "encoder":
        measure_vectors(sides, worker, folder / "vectors.npy")
    elif plan.loss:
        measure_loss(sides, worker, folder)
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
        "versions": known_versions,
        "not_given": sorted({form.python for form in plan.forms.values()} - set(pythons)),
        "idle_cpu_s": round(max(idle), 3),
        "machine": machine(load),
    }


def starts(plan: Contest, worker: Callable[[], Any]) -> Result:
    """Of fresh processes: quartiles of the seconds to a first token, the most memory after one more measurement."""
    seconds, peaks = [], []
    for _ in range(STARTS):
        with worker() as ask:
            seconds.append(ask("load"))
            ask(*plan.first)
            peaks.append(ask("peak"))
    return {"first_s": quartiles(np.array(seconds)), "peak_mb": round(max(peaks))}


def measure_loss(sides: Mapping[str, Result], worker: Callable[[str], Any], scratch: Path) -> None:
    """Adds the loss of each side, and how far it is from the first, float32, of a process of its own: the mean KL, and
    the largest difference of logits over the largest logit."""
    with tempfile.TemporaryDirectory(dir=scratch) as exact:
        for name, side in sides.items():
            console.print(f"loss of {name}")
            with worker(name) as ask:
                loss, kl, apart = ask("loss", WINDOW, exact)
            side |= {"loss": round(loss, 4), "kl": round(kl, 5), "apart": float(f"{apart:.3g}")}


def measure_vectors(sides: Mapping[str, Result], worker: Callable[[str], Any], vectors: Path) -> None:
    """Adds the loss of each side of an encoder, whose `vectors` are compared with the first's, float32."""
    base = None
    for name, side in sides.items():
        console.print(f"loss of {name}")
        with worker(name) as ask:
            ask("load")
            ask("vectors", str(vectors))
            found = np.load(vectors).astype(np.float64)
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        base = found if base is None else base
        cosine = (found * base).sum(1)
        side |= {"loss": round(1 - cosine.mean(), 6), "least_cosine": round(cosine.min(), 5)}


def write_inputs(kind: str, model: Path, texts: Iterable[Path], path: Path) -> None:
    """What workers are fed: token ids [S] of the text; for an encoder also its sentences with their masks.

    A causal LM's windows each begin with what its tokenizer puts before a text: Gemma without it says nothing.
    """
    tokenizer, words = tokenizer_of(model), "\n\n".join(read_text(each) for each in texts)
    ids = np.array(tokenizer.encode(words, add_special_tokens=False).ids, np.int64)
    if kind != "encoder" and (begin := tokenizer.encode("").ids):
        step = WINDOW - len(begin)
        ids = np.concatenate([np.append(begin, ids[at : at + step]) for at in range(0, len(ids), step)])
    arrays: dict[str, Any] = {"ids": ids}
    if kind == "encoder":
        rows = [tokenizer.encode(each).ids[:LONGEST] for each in sentences(words)]
        arrays["sentences"] = np.array([each + [0] * (LONGEST - len(each)) for each in rows], np.int64)
        arrays["mask"] = np.array([[1] * len(each) + [0] * (LONGEST - len(each)) for each in rows], np.int64)
    elif len(ids) < (wanted := max(int(request[1]) + STEPS for request in CONTESTS[kind].rounds.values())):
        where = ", ".join(map(str, texts))
        raise UserError("the text is too short", where=where, expected=f"{wanted} tokens", found=str(len(ids)))
    np.savez(path, **arrays)


def machine(before: float) -> str:
    """This machine, and its load `before` and after: what is above the cores is other work, which scatters rounds."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    name = found[1] if found else platform.machine()
    return f"{name}, {os.cpu_count()} cores, load {before:.1f} before and {os.getloadavg()[0]:.1f} after"


def pythons_of(**peers: Path | None) -> dict[str, str]:
    """Whose Python runs what: ours, and those that were given."""
    return {"ours": sys.executable} | {name: str(python) for name, python in peers.items() if python is not None}


@contextmanager
def folder_for(name: str, scratch: Path | None) -> Iterator[Path]:
    """Where all that is made of a model lies: in `scratch` it stays, with what was there."""
    with tempfile.TemporaryDirectory() as made:
        folder = (scratch or Path(made)) / re.sub(r"\W+", "-", name)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def prepared(model: Path | None, shape: str | None, folder: Path) -> tuple[str, Path]:
    """The kind of contest, and what is compiled: the checkpoint, random weights, or what torch exported."""
    if (model is None) == (shape is None):
        raise UserError("what is to be measured?", expected="a MODEL, or --shape")
    if model is None:
        assert shape is not None
        model = folder / "checkpoint"
        if not model.is_dir():
            write_checkpoint(model, SHAPES[shape], tokenizer=True)
        return "shape", model
    names = read_json(model / "config.json").get("architectures") or [""]
    if names[0].endswith("ForCausalLM"):
        return "decoder", model
    encoder = folder / "encoder"  # without what sentence-transformers puts behind it, which peers do not have
    shutil.rmtree(encoder, ignore_errors=True)
    shutil.copytree(model, encoder, ignore=shutil.ignore_patterns("modules.json"))
    make(Form("", "", ("-c", EXPORT, MODEL, MADE), "", "", 32), sys.executable, encoder, encoder / EXPORTED)
    return "encoder", encoder


def main(
    model: Annotated[Path | None, typer.Argument(help="folder of a causal LM or of an encoder")] = None,
    shape: Annotated[Literal["0.5b", "1.5b"] | None, typer.Option(help="random weights in Qwen2's shape")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="English in UTF-8; examples/text/bench.txt")] = None,
    llama: Annotated[Path | None, typer.Option(help="a python that has llama-cpp-python and gguf")] = None,
    genai: Annotated[Path | None, typer.Option(help="a python that has onnxruntime-genai")] = None,
    openvino: Annotated[Path | None, typer.Option(help="a python that has openvino, optimum-intel and nncf")] = None,
    onnx: Annotated[list[Path] | None, typer.Option(help="the same encoder as somebody else made it")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    scratch: Annotated[Path | None, typer.Option(help="keeps what peers made, for the next run")] = None,
    out: Annotated[Path, typer.Option(help="the JSON; .md and .png go beside it")] = OUT,
) -> None:
    """Measure a model in every configuration; the files keep the last results of other models."""
    pythons, results = pythons_of(llama=llama, genai=genai, openvino=openvino), known(out)
    name = model.absolute().name if model is not None else f"Qwen2's shape of {shape}, random weights"
    with folder_for(name, scratch) as folder:
        kind, compiled = prepared(model, shape, folder)
        texts = text or [TEXT]
        results[name] = measured_model(
            kind, compiled, model or compiled, texts, folder, pythons, rounds, others=onnx or ()
        )
    keep(out, results, markdown(results))
    plot(results, out.with_suffix(".png"))
