"""What the CPU road reaches: `instantrt bench compile [PART ...]` writes benchmarks/compile.json and compile.md.

    rate        quantizing and writing, weights a second, beside ONNX Runtime's own quantizer on the same weights
    memory      peak memory: of the quantize-and-write stage, and of compiling a model of Qwen2-7B's shape
    smoke       what running each artifact once adds to a compilation of 30 layers, in seconds and memory
    decode      one token through layers of 2048 x 8192, beside float32, and the error of the per-channel forms
    perplexity  of every mode on the evaluation text, beside float

Machines are shared and noisy: every comparison is a ratio within one run, the two sides taking turns.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
import typer
from rich.console import Console
from safetensors.numpy import save_file

from instantrt.compiler.artifact.digest import sha256
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.checkpoint import read_header
from instantrt.compiler.compile import Watch, compile_model
from instantrt.compiler.llm import load_artifact
from instantrt.compiler.request import Request
from instantrt.compiler.smoke.ran import Ran
from instantrt.passes.core.lazy import FileTensor, whole
from instantrt.passes.core.linear import linear, weight_constant
from instantrt.passes.core.quant import InstantQuant, QuantTensor
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.ort.limbs import ONE_LIMB_X86
from instantrt.passes.ort.linear import linear_passes
from instantrt.passes.qdq.insert_qdq import InsertDequantize, QuantizeActivations
from instantrt.tools.bench.synthetic import QWEN2_05B, QWEN2_7B, SMOLLM2_135M, write_checkpoint

Array = npt.NDArray[Any]
Result = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
FLOAT32 = np.dtype(np.float32)
console = Console()

# name: bits, group size (0 is per channel), activations, CPU preset
MODES: dict[str, tuple[int, int, str, str]] = {
    "A16W8 per-channel": (8, 0, "float", "exact"),
    "A16W8 per-channel, fast": (8, 0, "float", "fast"),
    "A16W8 g128": (8, 128, "float", "exact"),
    "A16W8 g128, fast": (8, 128, "float", "fast"),
    "A16W8 g32, fast": (8, 32, "float", "fast"),
    "A8W8 per-channel": (8, 0, "int8", "exact"),
    "A16W4 g32": (4, 32, "float", "exact"),
    "A16W4 g32, fast": (4, 32, "float", "fast"),
    "A16W4 g128, fast": (4, 128, "float", "fast"),
}


def write_weights(folder: Path, shapes: list[tuple[int, int]]) -> dict[str, FileTensor]:
    """A bf16 checkpoint of random weights."""
    random = np.random.default_rng(0)
    weights = {
        f"l{i}.weight": (random.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
        for i, shape in enumerate(shapes)
    }
    save_file(weights, folder / "model.safetensors")
    return read_header(folder / "model.safetensors")


def layer_chain(tensors: Mapping[str, FileTensor]) -> gs.Graph:
    """x -> every layer in turn -> y, in FLOAT normal form."""
    first = next(iter(tensors.values()))
    x = gs.Variable("x", FLOAT32, ["b", "s", first.shape[1]])
    nodes, value = [], x
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        n, k = tensor.shape
        out = gs.Variable(f"y.{path}", FLOAT32, ["b", "s", n])
        nodes.append(gs.Node("MatMul", path, {}, [value, weight_constant(path, tensor, (n, k))], [out]))
        value = out
    return gs.Graph(nodes, [x], [value], opset=23, ir_version=10)


def lowered(tensors: Mapping[str, FileTensor], mode: str) -> gs.Graph:
    bits, group, activations, preset = MODES[mode]
    graph, table = layer_chain(tensors), {}
    for node in graph.nodes:
        found = linear(node)
        assert found is not None
        size, symmetric = group or found.shape[1], activations == "int8"
        source = InstantQuant(found.path, found.rows, bits, size, symmetric, FLOAT32)
        table[found.path] = QuantTensor(
            found.path, source, found.shape, bits, size, symmetric, FLOAT32, "int8" if symmetric else "float"
        )
    run(graph, (InsertDequantize(table), QuantizeActivations()), PassLog())
    return run(graph, linear_passes(preset, ONE_LIMB_X86), PassLog())  # type: ignore[arg-type]


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
    seconds: dict[str, list[float]] = {name: [] for name in (*limits, *MODES)}
    written: dict[str, int] = {}
    for _ in range(9):
        for name, work in limits.items():
            seconds[name].append(median(work, 1))
        for mode, graph in graphs.items():
            seconds[mode].append(median(lambda graph=graph: write_model(graph, out / "out.onnx"), 1))  # type: ignore[misc]
            written[mode] = (out / "out.onnx.data").stat().st_size
    result: Result = {"weights": count}
    for name in limits:
        result[name] = {"gb_per_s": quartiles(2 * count / 1e9, seconds[name])}
    for mode in MODES:
        typical, disk = float(np.median(seconds[mode])), 2 * count / float(np.median(seconds["written to the disk"]))
        result[mode] = {
            "million_weights_per_s": [round(v) for v in quartiles(count / 1e6, seconds[mode])],
            "gb_read_per_s": round(2 * count / typical / 1e9, 2),
            "gb_written_per_s": round(written[mode] / typical / 1e9, 2),
            "the_disk_allows_million": round(disk * count / written[mode] / 1e6),
        }
    result["peer"] = against_peer(folder, {name: tensors[name] for name in list(tensors)[:4]})
    return result


def quartiles(amount: float, seconds: list[float]) -> list[float]:
    """Of the rates at which `amount` was done."""
    return [round(float(v), 2) for v in np.percentile(amount / np.array(seconds), (25, 50, 75))]


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
from inspect import getdoc
from pathlib import Path
from instantrt.compiler.checkpoint import read_header
from instantrt.tools.bench.compile import lowered, peak_kb, write_model
folder = Path(sys.argv[1])
graph = lowered(read_header(folder / "model.safetensors"), sys.argv[2])
before = peak_kb()
write_model(graph, folder / "out.onnx")
print(before, peak_kb())
"""
SESSION = """
import sys
from instantrt.compiler.serving.runtime.onnx_engine import SharedEngine
from instantrt.compiler.smoke.child import peak_kb
import numpy as np
SharedEngine(sys.argv[1], 1, 16).prefill(0, np.arange(8), 0)
print(peak_kb())
"""
COMPILE = """
import atexit, sys
from instantrt.tools.cli.app import compile_main
atexit.register(lambda: print(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")), file=sys.stderr))
compile_main()
"""


def peak_kb() -> int:
    """This program's peak resident memory (Linux); getrusage would also count the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def memory(folder: Path) -> Result:
    """Peak resident memory, in MB, each in a process of its own."""
    result: Result = {}
    write_weights(folder, [(3584, 18944), (18944, 3584)])
    for mode in MODES:
        done = subprocess.run([sys.executable, "-c", STAGE, folder, mode], capture_output=True, text=True, check=True)
        before, after = map(int, done.stdout.split())
        result[mode] = {"quantize_and_write_mb": (after - before) // 1024}
    model = folder / "qwen2-7b"
    size = write_checkpoint(model, QWEN2_7B)
    for quant, extra in (("a16w8", ["--group-size", "128"]), ("a16w8", [])):
        command: list[str | Path] = [sys.executable, "-c", COMPILE, model, "--target", "x86", "--quant", quant, *extra]
        started = time.monotonic()
        done = subprocess.run([*command, "-o", folder / "out"], capture_output=True, text=True, check=True)
        written = sum(p.stat().st_size for p in (folder / "out").rglob("*") if p.is_file())
        result[f"Qwen2-7B {quant} {' '.join(extra) or 'per-channel'}"] = {
            "checkpoint_gb": round(size / 1e9, 1),
            "artifact_gb": round(written / 1e9, 1),
            "peak_rss_mb": int(done.stderr.split("VmHWM:")[1].split()[0]) // 1024,
            "seconds": round(time.monotonic() - started),
        }
        shutil.rmtree(folder / "out")
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


def decode(folder: Path) -> Result:
    """Speed of one token against float32, the sessions taking turns; error of the per-channel forms in float64."""
    import onnxruntime as ort

    tensors = write_weights(folder, [(8192, 2048), (2048, 8192)] * 4)
    sessions: dict[str, ort.InferenceSession] = {}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    graphs = {"float32": layer_chain(tensors), **{mode: lowered(tensors, mode) for mode in MODES}}
    for name, graph in graphs.items():
        path = folder / f"{len(sessions)}.onnx"
        write_model(graph, path)
        sessions[name] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((1, 1, 2048), np.float32)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(30):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {"x": x})
            times[name].append(time.perf_counter() - started)
    base = np.array(times["float32"])
    result: Result = {
        name: {"times_as_fast_as_float32": round(float(np.median(base / np.array(taken))), 2)}
        for name, taken in times.items()
    }
    result["error"] = per_channel_error(folder)
    return result


def per_channel_error(folder: Path) -> Result:
    """One layer, 16 tokens with outlier channels: |y - W x| / |W x| for exact weights (the floor) and the artifact."""
    import onnxruntime as ort

    tensors = write_weights(folder, [(2048, 2048)])
    w = whole(tensors["l0.weight"]).astype(np.float64)
    x = np.random.default_rng(2).standard_normal((1, 16, 2048), np.float32)
    x[..., ::100] *= 30
    want = x[0].astype(np.float64) @ w.T
    source = InstantQuant("l0", tensors["l0.weight"], 8, 2048, False, FLOAT32)
    q = np.concatenate([(c.astype(np.float64) - z) * s for _, (c, s, z) in source.tiles()])
    path = folder / "error.onnx"
    write_model(lowered(tensors, "A16W8 per-channel"), path)
    got = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0][0]
    floor = np.linalg.norm(x[0] @ q.T - want) / np.linalg.norm(want)
    ours = np.linalg.norm(got - want) / np.linalg.norm(want)
    return {"weight_only_floor": float(f"{floor:.4g}"), "two_limbs": float(f"{ours:.4g}")}


def prefill(folder: Path) -> Result:
    """A prompt of 512 tokens on a model of Qwen2-0.5B's shape, 152,064 words: logits of all tokens and of the last.

    The two take turns; quartiles of the milliseconds of ten rounds, and of the ratios within a round.
    """
    write_checkpoint(folder / "model", QWEN2_05B)
    models = {}
    for logits in ("all", "last"):
        request = Request(folder / "model", ("x86",), folder / logits, quant="a16w8", group_size=128, logits=logits)
        compile_model(request)
        models[logits] = load_artifact(folder / logits)
    ids = np.random.default_rng(0).integers(0, 1000, (1, 512))
    empty = np.zeros((1, QWEN2_05B["num_key_value_heads"], 0, 64), np.float32)
    past = {s.name: empty for s in models["all"].artifact.inputs if s.name.startswith("past_key_values.")}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(11):
        for name, model in models.items():
            started = time.perf_counter()
            model(input_ids=ids, attention_mask=np.ones_like(ids), position_ids=np.arange(512)[None], **past)
            times[name].append((time.perf_counter() - started) * 1e3)
    base, last = (np.array(times[name][1:]) for name in models)  # the first round warms up

    def quartiles(values: Array) -> list[float]:
        return [round(float(v), 2) for v in np.percentile(values, (25, 50, 75))]

    return {name: {"quartiles": quartiles(v)} for name, v in (("all", base), ("last", last), ("ratio", base / last))}


PERPLEXITY = (
    "none",
    "a16w8",
    "a16w8 --cpu-preset fast",
    "a16w8 --group-size 32",
    "a16w8 --group-size 128",
    "a16w8 --group-size 128 --cpu-preset fast",
    "a16w8 --lm-head int8 --embeddings int8",
    "a8w8",
    "a16w4 --group-size 32",
    "a16w4 --group-size 32 --cpu-preset fast",
    "a16w4 --group-size 64",
    "a16w4 --group-size 128",
    "a16w4",
)


def perplexities(folder: Path) -> Result:
    """Of each mode on the evaluation text, and the increase over float in percent."""
    from instantrt.compiler.accuracy.perplexity import artifact_logits, perplexity_of, text_windows, transformers_logits

    model = ROOT / "examples" / "tiny-qwen2"
    parts = text_windows(model, ROOT / "examples" / "text" / "evaluation.txt")
    base = perplexity_of(transformers_logits(model), parts)
    result: Result = {"transformers float32": {"perplexity": round(base, 3)}}
    for mode in PERPLEXITY:
        command = [sys.executable, "-m", "instantrt", "compile", str(model), "--target=x86", f"--out={folder / 'out'}"]
        subprocess.run([*command, "--quant", *mode.split()], check=True, stdout=subprocess.DEVNULL)
        value = perplexity_of(artifact_logits(folder / "out"), parts)
        result[mode] = {"perplexity": round(value, 3), "increase_percent": round((value / base - 1) * 100, 3)}
    return result


def median(function: Callable[[], Any], times: int) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


PARTS: dict[str, Callable[[Path], Result]] = {
    "rate": rate,
    "memory": memory,
    "smoke": smoke,
    "decode": decode,
    "prefill": prefill,
    "perplexity": perplexities,
}


def markdown(results: Mapping[str, Result]) -> str:
    lines = ["# What the CPU road reaches", "", "Written by `instantrt bench compile`.", ""]
    for part, result in results.items():
        lines += [f"## {part}", "", getdoc(PARTS[part]) or "", "", "| what | measured |", "|---|---|"]
        for name, value in result.items():
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            lines.append(f"| {name} | {shown.replace('_', ' ')} |")
        lines.append("")
    return "\n".join(lines)


def main(
    parts: Annotated[
        list[str] | None, typer.Argument(help="rate, memory, smoke, decode, prefill, perplexity; all by default")
    ] = None,
    scratch: Annotated[Path | None, typer.Option(help="a folder with 40 GB of room")] = None,
) -> None:
    """Run the parts and write benchmarks/compile.json and compile.md; parts not run keep their last results."""
    out = ROOT / "benchmarks" / "compile.json"
    results: dict[str, Result] = json.loads(out.read_text())["results"] if out.is_file() else {}
    for part in parts or list(PARTS):
        with tempfile.TemporaryDirectory(dir=scratch) as folder, console.status(part):
            results[part] = PARTS[part](Path(folder))
        console.print(part, results[part])
    ordered = {part: results[part] for part in PARTS if part in results}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "results": ordered}, indent=2) + "\n")
    out.with_suffix(".md").write_text(markdown(ordered))
