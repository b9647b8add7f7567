"""A GGUF file compiled as it is, beside llama.cpp: `instantrt bench gguf FILE...` writes benchmarks/gguf.json and .md.

Bytes, loss, divergence from the float32 model of the same dequantized weights, and speed of each preset, measured as
`instantrt bench cpu` does; what a compile takes is its wall time with nothing in a cache.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from instantrt.compiler.frontend.gguf.folder import made_folder
from instantrt.compiler.quant.gguf import KINDS, GgufRows, GgufTensor
from instantrt.tools.bench.compile_time import measured, shown
from instantrt.tools.bench.cpu import folder_for, measured_model, pythons_of
from instantrt.tools.bench.cpu_contests import AUTO, FLOAT, MADE, MODEL, OF_GGUF
from instantrt.tools.bench.cpu_page import MIB, notes, speed_cell
from instantrt.tools.bench.results import Result, in_turns, keep, known, quartiles
from instantrt.tools.markdown import table
from instantrt.tools.places import BENCHMARKS, TEXT

TITLES = ("", "loss", "KL", "logits", "MiB", *OF_GGUF.rounds)
OUT = BENCHMARKS / "gguf.json"


def main(
    files: Annotated[list[Path], typer.Argument(help="GGUF files of causal LMs that take 1056 tokens")],
    text: Annotated[Path, typer.Option(help="English in UTF-8")] = TEXT,
    llama: Annotated[Path | None, typer.Option(help="a python that has llama-cpp-python")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    scratch: Annotated[Path | None, typer.Option(help="gets the artifacts, and keeps them")] = None,
    out: Annotated[Path, typer.Option(help="the JSON; .md goes beside it")] = OUT,
) -> None:
    """Measure GGUF files in every preset; the JSON and the page keep the last results of other files."""
    results, pythons = known(out), pythons_of(llama=llama)
    for file in files:
        with folder_for(file.name, scratch) as folder:
            results[file.name] = one(file.absolute(), text, folder, pythons, rounds)
        keep(out, results, markdown(results))


def one(file: Path, text: Path, folder: Path, pythons: Mapping[str, str], rounds: int) -> Result:
    """All that is measured of a file."""
    given = {MODEL: str(file), MADE: str(folder / "timed")}
    words = [given.get(word, word) for word in OF_GGUF.forms[AUTO].words]
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = {"HF_HUB_OFFLINE": "1", "INSTANTRT_CACHE": cache}
        seconds = measured([sys.executable, *words], folder / "timed.log", environment)[0]
    made = made_folder(file)  # held while it is read
    read = rate(made.weights, rounds)
    found = measured_model("gguf", file, made.path, [text], folder, pythons, rounds)
    about = {"bytes": file.stat().st_size, "compile_s": round(seconds, 1), "weights_per_s": read}
    return found | {"text": text.name} | about


def rate(weights: Mapping[str, Any], rounds: int) -> list[float]:
    """Quartiles of the weights a second that become codes, scales and zero points on one thread; the first round, in
    which the file may come from the disk, is not counted."""
    tensors = {each for each in weights.values() if isinstance(each, GgufTensor) and each.kind in KINDS}

    def read() -> None:
        for tensor in tensors:
            for _tile in GgufRows(tensor).tiles():
                pass

    seconds = in_turns({"read": read}, rounds, warm=1)["read"]
    return quartiles(sum(int(np.prod(each.shape)) for each in tensors) / seconds)


ABOUT = """GGUF files as they come, compiled for a CPU. Written by `instantrt bench gguf`; [GGUF files](../gguf.md)
says what is done with them. **What to choose**: `auto`, the default; `exact` for the file's own logits, `fast` for
speed at about llama.cpp's own KL or less.

float32 is the model of the same dequantized weights (`--requantize --quant none`). Loss is in nats a token of a text,
in windows of 512 tokens, each begun as the tokenizer begins a text; KL is the mean divergence of the next token's
distribution from float32's; logits: the largest difference from float32's, over the largest of those. MiB are of
weights and graph, behind them the ratio to the GGUF file. Speeds are tokens a second of two threads, medians of rounds
in which all take turns, and behind them their ratio to llama.cpp within a round, with quartiles. Reading is from
blocks to codes, scales and zero points, on one thread, of a file in the page cache. A load above the cores is other
work: it scatters speeds."""


def markdown(results: Mapping[str, Result]) -> str:
    lines = ["# GGUF files beside llama.cpp", "", ABOUT, ""]
    for name, result in results.items():
        lines += [f"## {name}", "", *table(TITLES, sides_table(result)), ""]
        read = [each / 1e6 for each in result["weights_per_s"]]
        lines += [
            f"* compiled in {result['compile_s']} s, with nothing in a cache; reading {shown(read, 'M weights/s')}",
            *notes(result),
            "",
        ]
    return "\n".join(lines)


def sides_table(result: Result) -> Iterator[tuple[str, ...]]:
    sides = result["sides"]
    for name, side in sides.items():
        size = f"{side['bytes'] / MIB:.1f} ({side['bytes'] / result['bytes']:.2f}x)"
        apart = ("itself", "") if name == FLOAT else (f"{side['kl']:.5f}", f"{side['apart']:.1e}")
        speeds = (speed_cell(OF_GGUF, sides, name, measure) for measure in OF_GGUF.rounds)
        yield name, f"{side['loss']:.4f}", *apart, size, *speeds
