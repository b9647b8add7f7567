"""What the CPU road reaches: `instantrt bench compile [PART ...]` writes benchmarks/compile.json and compile.md.

    speed       seconds of a compilation of 30 layers, cold and warm, beside other exporters
    depth       80 layers against 30
    engine      the same for an engine: our work, and TensorRT-RTX's
    large       seconds and peak memory of compiling a model of Qwen2-7B's shape
    rate        quantizing and writing, weights a second, beside ONNX Runtime's own quantizer on the same weights
    memory      peak memory of the quantize-and-write stage
    smoke       what running each artifact once adds to a compilation of 30 layers, in seconds and memory
    decode      one token through layers of 2048 x 8192, beside float32, and the error of the per-channel forms
    perplexity  of every mode on the evaluation text, beside float

Machines are shared and noisy: every comparison is a ratio within one run, the two sides taking turns.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import typer

from instantrt.compiler.artifact.digest import sha256
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.compile import compile_model
from instantrt.compiler.request import Request
from instantrt.compiler.smoke.ran import Ran
from instantrt.compiler.watch import Watch
from instantrt.passes.core.lazy import Array, FileTensor, whole
from instantrt.tools.bench.compile_time import check_room, depth, engine, large, part_table, plot, speed
from instantrt.tools.bench.layers import MODES, layer_chain, lowered, write_weights
from instantrt.tools.bench.results import Result, in_turns, keep, known, quartiles
from instantrt.tools.bench.running import decode, perplexities
from instantrt.tools.bench.synthetic import SMOLLM2_135M, write_checkpoint
from instantrt.tools.cli.console import console
from instantrt.tools.markdown import table
from instantrt.tools.places import BENCHMARKS

OUT = BENCHMARKS / "compile.json"
SPEED = OUT.with_name("compile_time.png")


def rate(folder: Path) -> Result:
    """Million weights a second from bf16 safetensors in the page cache to an artifact with its digests, by mode; GB/s.

    Quartiles of nine rounds, in which what bounds it takes its turn: two threads that only read the checkpoint, one
    that only hashes it, one that writes as much to the page cache, and to the disk (until fdatasync returns). Beside
    each mode: how many the disk alone allows. And ONNX Runtime's MatMulNBitsQuantizer on the same weights.
    """
    tensors = write_weights(folder, [(8192, 2048), (2048, 8192)] * 6)
    count, source, out = sum(t.shape[0] * t.shape[1] for t in tensors.values()), folder / "model.safetensors", folder
    limits: dict[str, Callable[[], Any]] = {
        "read by two threads": lambda: read_alone(source, 2),
        "sha256 by one thread": lambda: sha256(source),
        "written to the page cache": lambda: write_alone(out / "zeros", 2 * count, sync=False),
        "written to the disk": lambda: write_alone(out / "zeros", 2 * count, sync=True),
    }
    graphs = {mode: lowered(tensors, mode) for mode in MODES}
    written: dict[str, int] = {}

    def write(mode: str) -> None:
        write_model(graphs[mode], out / "out.onnx")
        written[mode] = (out / "out.onnx.data").stat().st_size

    seconds = in_turns(limits | {mode: partial(write, mode) for mode in MODES}, 9)
    result: Result = {"weights": count}
    for name in limits:
        result[name] = {"gb_per_s": quartiles(2 * count / 1e9 / seconds[name])}
    for mode in MODES:
        typical, disk = float(np.median(seconds[mode])), 2 * count / float(np.median(seconds["written to the disk"]))
        result[mode] = {
            "million_weights_per_s": [round(v) for v in quartiles(count / 1e6 / seconds[mode])],
            "gb_read_per_s": round(2 * count / typical / 1e9, 2),
            "gb_written_per_s": round(written[mode] / typical / 1e9, 2),
            "the_disk_allows_million": round(disk * count / written[mode] / 1e6),
        }
    result["peer"] = against_peer(folder, {name: tensors[name] for name in list(tensors)[:4]})
    return result


def read_alone(path: Path, threads: int) -> None:
    """Each thread reads every `threads`-th MiB."""

    def read(first: int) -> None:
        with path.open("rb", buffering=0) as file:
            buffer, size = memoryview(bytearray(1 << 20)), path.stat().st_size
            for offset in range(first << 20, size, threads << 20):
                os.preadv(file.fileno(), [buffer], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))


def write_alone(path: Path, size: int, *, sync: bool) -> None:
    block = os.urandom(1 << 20)
    with path.open("wb", buffering=0) as file:
        for _ in range(size >> 20):
            file.write(block)
        if sync:
            os.fdatasync(file.fileno())


def against_peer(folder: Path, tensors: Mapping[str, FileTensor]) -> Result:
    """8 bits, groups of 128: the same codes, and how much faster. The peer reads float32 ONNX, its only input."""
    import logging

    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    logging.disable(logging.INFO)
    write_model(layer_chain(tensors), folder / "float.onnx")
    ours, theirs = [], []
    for _ in range(3):
        started = time.perf_counter()
        config = DefaultWeightOnlyQuantConfig(block_size=128, is_symmetric=False, bits=8, accuracy_level=4)
        quantizer = MatMulNBitsQuantizer(str(folder / "float.onnx"), algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(folder / "peer.onnx"), True)
        theirs.append(time.perf_counter() - started)
        started = time.perf_counter()
        write_model(lowered(tensors, "A16W8 g128, fast"), folder / "ours.onnx")
        ours.append(time.perf_counter() - started)
        weights = [whole(tensor) for tensor in tensors.values()]
        equal = compare_codes(folder / "ours.onnx", folder / "peer.onnx", weights)
        for path in folder.glob("peer.onnx*"):
            path.unlink()
    return {"times_as_fast": round(float(np.median(np.array(theirs) / np.array(ours))), 1), **equal}


def compare_codes(ours: Path, peer: Path, weights: list[Array]) -> Result:
    """Scales, zero points and levels (code less zero) of both; where they differ, w / scale must lie at a tie."""
    import onnx
    from onnx import numpy_helper

    def constants(path: Path) -> list[list[Array]]:
        model = onnx.load(path)
        by_name = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        return [[by_name[i] for i in n.input[1:4]] for n in model.graph.node if n.op_type == "MatMulNBits"]

    different = total = 0
    farthest, same_scales = 0.0, True
    for w, mine, theirs in zip(weights, constants(ours), constants(peer), strict=True):
        (q, s, z), (pq, ps, pz) = (
            [a.reshape(*mine[0].shape[:2], -1).astype(np.float64) for a in m] for m in (mine, theirs)
        )
        same_scales &= bool((s == ps).all())
        quotient = w.astype(np.float64).reshape(q.shape) / s
        apart = (q - z) != (pq - pz)
        farthest = max(farthest, float(np.abs(quotient[apart] - np.floor(quotient[apart]) - 0.5).max(initial=0)))
        different += int(apart.sum())
        total += q.size
    return {
        "scales_identical": same_scales,
        "levels_that_differ": f"{different} of {total}",
        "farthest_of_those_from_a_tie": float(f"{farthest:.2g}"),
    }


STAGE = """
import sys
from pathlib import Path
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.checkpoint import read_header
from instantrt.tools.bench.layers import lowered, peak_kb
folder = Path(sys.argv[1])
graph = lowered(read_header(folder / "model.safetensors"), sys.argv[2])
before = peak_kb()
write_model(graph, folder / "out.onnx")
print(before, peak_kb())
"""
SESSION = """
import sys
from pathlib import Path
from instantrt.compiler.serving.runtime.onnx_engine import SharedEngine
from instantrt.compiler.smoke.child import peak_kb
import numpy as np
SharedEngine(Path(sys.argv[1]), 1, 16).prefill(0, np.arange(8), 0)
print(peak_kb())
"""


def memory(folder: Path) -> Result:
    """Peak resident memory, in MB, each in a process of its own."""
    result: Result = {}
    write_weights(folder, [(3584, 18944), (18944, 3584)])
    for mode in MODES:
        done = subprocess.run([sys.executable, "-c", STAGE, folder, mode], capture_output=True, text=True, check=True)
        before, after = map(int, done.stdout.split())
        result[mode] = {"quantize_and_write_mb": (after - before) // 1024}
    return result


def smoke(folder: Path) -> Result:
    """What running each artifact once adds to compiling a model of SmolLM2-135M's shape, 30 layers of random weights.

    Seconds of the whole, the share of the smoke run, and the peak memory of its process beside that of a session alone.
    """
    write_checkpoint(folder / "model", SMOLLM2_135M)
    result: Result = {}
    for quant in ("none", "a16w8", "a16w4", "a8w8"):
        seen = SmokeSeen()
        request = Request(folder / "model", ("x86",), folder / quant, quant=quant)
        started = time.perf_counter()
        compile_model(request, watch=seen)
        seconds = time.perf_counter() - started
        model = folder / quant / "x86" / "model.onnx"
        alone = subprocess.run([sys.executable, "-c", SESSION, model], capture_output=True, text=True, check=True)
        (ran,) = seen.all
        result[quant] = {
            "seconds": round(seconds, 1),
            "of_these_smoke": round(ran.seconds, 1),
            "percent": round(100 * ran.seconds / seconds, 1),
            "its_process_mb": ran.peak_kb // 1024,
            "a_session_mb": int(alone.stdout) // 1024,
        }
    return result


class SmokeSeen(Watch):
    """What the smoke run said."""

    def __init__(self) -> None:
        self.all: list[Ran] = []

    def ran(self, ran: Ran) -> None:
        self.all.append(ran)


PARTS: dict[str, Callable[..., Result]] = {
    "speed": speed,
    "depth": depth,
    "engine": engine,
    "large": large,
    "rate": rate,
    "memory": memory,
    "smoke": smoke,
    "decode": decode,
    "perplexity": perplexities,
}


TABLES = """Where a table has goals: medians of the rounds, with quartiles behind them; wall time and CPU time of all
processes together, memory of the largest."""


def markdown(results: Mapping[str, Result]) -> str:
    lines = ["# What the CPU road reaches", "", "Written by `instantrt bench compile`.", "", TABLES, ""]
    for part, result in results.items():
        lines += [f"## {part}", "", getdoc(PARTS[part]) or "", ""]
        lines += [*part_table(result), ""] if "rows" in result else [*named_values(result), ""]
        if part == "speed":
            lines += [f"![wall time of each]({SPEED.name})", ""]
    return "\n".join(lines)


def named_values(result: Result) -> list[str]:
    def shown(value: Any) -> str:
        said = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        return said.replace("_", " ")

    return table(("what", "measured"), ((name, shown(value)) for name, value in result.items()))


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(PARTS)}; all by default")] = None,
    scratch: Annotated[Path | None, typer.Option(help="a folder with 40 GB of room")] = None,
    rounds: Annotated[int, typer.Option(help="of speed, depth and engine", min=1)] = 5,
    genai: Annotated[Path | None, typer.Option(help="for speed: a python that has onnxruntime-genai")] = None,
    optimum: Annotated[Path | None, typer.Option(help="for speed: a python that has optimum-onnx")] = None,
) -> None:
    """Run the parts and write benchmarks/compile.json and compile.md; parts not run keep their last results."""
    results = known(OUT)
    settings: dict[str, dict[str, Any]] = {
        "speed": {"rounds": rounds, "peers": {"genai": genai, "optimum": optimum}},
        "depth": {"rounds": rounds},
        "engine": {"rounds": rounds},
    }
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    os.environ["INSTANTRT_CACHE"] = "none"  # no part starts warm but those that say so
    if "large" in (parts or PARTS):
        check_room(scratch or Path(tempfile.gettempdir()))
    for part in parts or PARTS:
        with tempfile.TemporaryDirectory(dir=scratch) as folder, console.status(part):
            results[part] = PARTS[part](Path(folder), **settings.get(part, {}))
        console.print(part, results[part])
        ordered = {part: results[part] for part in PARTS if part in results}
        keep(OUT, ordered, markdown(ordered), machine=machine)
        if part == "speed":
            plot(results[part], SPEED)
