"""Times WeightOnlyGemm and its peers: CUDA graphs over rotating copies of the weights, peers interleaved, medians.

One launch is a graph of enough calls that the weights they touch exceed the L2 cache several times. All contestants of
a case are captured first and then replayed in turn (A, B, C, A, B, C, ...), so that clocks and heat treat them alike.
The quantize kernel of A8W8 and A8W4 is inside its time. `floor_us` is bytes over the measured read bandwidth, or
operations over the measured rate, whichever is more; fractions are of that.
"""

from __future__ import annotations

import ctypes
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tools.gpu.gemm import Gemm, Weight, random_weight
from tools.gpu.library import Library

LAYERS = {  # name: (n, k)
    "qwen2-7b qkv": (4608, 3584), "qwen2-7b o": (3584, 3584), "qwen2-7b gate_up": (37888, 3584),
    "qwen2-7b down": (3584, 18944), "llama3-8b qkv": (6144, 4096), "llama3-8b down": (4096, 14336),
    "70b o": (8192, 8192), "70b gate_up": (57344, 8192),
}  # fmt: skip
QUICK = ("qwen2-7b o", "qwen2-7b gate_up", "70b o")
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
WORKING_SET = 320 << 20  # bytes of distinct weights that one graph touches
REPLAYS = 20
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    layer: str
    m: int
    kernel: str
    median: float
    p10: float
    p90: float
    bytes: int
    flops: int
    plan: str = ""
    floor_us: float = 0.0
    fraction: float = 0.0


@dataclass(frozen=True)
class Contestant:
    name: str
    calls: list[Call]  # one for each copy of the weights
    bytes: int
    flops: int
    plan: str = ""


def pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return start, stop


def capture(calls: list[Call], launches: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    return graph


def race(layer: str, m: int, contestants: list[Contestant]) -> list[Timing]:
    launches = {c.name: max(32, len(c.calls)) for c in contestants}
    graphs = {c.name: capture(c.calls, launches[c.name]) for c in contestants}
    times: dict[str, list[float]] = {c.name: [] for c in contestants}
    for replay in range(REPLAYS + 2):
        for c in contestants:
            start, stop = pair()
            start.record()
            graphs[c.name].replay()
            stop.record()
            stop.synchronize()
            if replay >= 2:
                times[c.name].append(start.elapsed_time(stop) * 1e3 / launches[c.name])
    result = []
    for c in contestants:
        ordered = sorted(times[c.name])
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        middle = statistics.median(ordered)
        result.append(Timing(layer, m, c.name, middle, low, high, c.bytes, c.flops, c.plan))
    return result


def copies(size: int) -> int:
    return max(2, min(64, -(-WORKING_SET // size)))


def ours(library: Library, name: str, x: torch.Tensor, weight: Weight, **options: int) -> Contestant:
    size = weight.codes.nbytes + weight.affine.nbytes
    clones = [
        replace(weight, codes=weight.codes.clone(), affine=weight.affine.clone()) for _ in range(copies(size) - 1)
    ]
    gemms = [Gemm(library, x, w, options) for w in (weight, *clones)]
    m, flops = len(x), 2 * len(x) * weight.n * weight.k
    calls: list[Call] = list(gemms)
    return Contestant(name, calls, size + m * (weight.n + weight.k) * 2, flops, gemms[0].plan.kernel)


def cublas(x: torch.Tensor, n: int) -> Contestant:
    m, k = x.shape
    weights = [torch.randn((n, k), device="cuda", dtype=torch.float16).to(x.dtype) for _ in range(copies(n * k * 2))]
    y = torch.empty((m, n), device="cuda", dtype=x.dtype)
    calls: list[Call] = [lambda w=w: torch.matmul(x, w.T, out=y) for w in weights]  # type: ignore[misc]
    name = "cublas fp16" if x.dtype == torch.float16 else "cublas bf16"
    return Contestant(name, calls, (n * k + m * (n + k)) * 2, 2 * m * n * k)


def tinygemm(x: torch.Tensor, weight: Weight) -> Contestant:
    """torch._weight_int4pack_mm: w = (code - 8) * scale + zero', so zero' = (8 - zero) * scale."""
    even = (weight.natural[:, 0::2] << 4 | weight.natural[:, 1::2]).contiguous()
    packed = [torch._convert_weight_to_int4pack(even, 8) for _ in range(copies(weight.codes.nbytes))]
    scale, zero = weight.affine.float().unbind(-1)
    both = torch.stack((scale, (8 - zero) * scale), dim=-1).bfloat16().contiguous()
    calls: list[Call] = [lambda w=w: torch._weight_int4pack_mm(x, w, weight.group, both) for w in packed]  # type: ignore[misc]
    m, n, k = len(x), weight.n, weight.k
    return Contestant("torch int4pack bf16", calls, weight.codes.nbytes + both.nbytes + m * (n + k) * 2, 2 * m * n * k)


def int_mm(m: int, n: int, k: int) -> Contestant:
    """torch._int_mm: int32 output, no scales; the integer GEMM alone."""
    x = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
    weights = [torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8) for _ in range(copies(n * k))]
    calls: list[Call] = [lambda w=w: torch._int_mm(x, w.T) for w in weights]  # type: ignore[misc]
    return Contestant("torch int_mm", calls, n * k + m * k + m * n * 4, 2 * m * n * k)


def humming(x: torch.Tensor, weight: Weight) -> Contestant:
    """humming-kernels, weights of random bits: only its time is compared."""
    from humming.layer import HummingLayer  # type: ignore[import-not-found]
    from humming.tune import get_heuristics_config  # type: ignore[import-not-found]

    name = {4: "uint4", 8: "uint8"}[weight.bits]
    config = {"dtype": name, "group_size": weight.group, "scale_dtype": "float16", "has_zero_point": True}
    calls: list[Call] = []
    plain = json.dumps({"use_f16_accum": False})
    for _ in range(copies(weight.codes.nbytes)):
        layer = HummingLayer(
            shape_n=weight.n, shape_k=weight.k, weight_config=config,
            input_config={"dtype": "float16", "group_size": 0}, torch_dtype=torch.float16,
        ).cuda()  # fmt: skip
        layer.transform()
        tuned = get_heuristics_config(meta=layer.humming_metas[""])
        calls.append(lambda f=layer, t=tuned: f(inputs=x, compute_config=plain, tuning_config=t))  # type: ignore[misc]
    m, n, k = len(x), weight.n, weight.k
    size = weight.codes.nbytes + weight.affine.nbytes + m * (n + k) * 2
    return Contestant(f"humming int{weight.bits}", calls, size, 2 * m * n * k)


def roofs(reader: Path) -> dict[str, float]:
    """What this GPU reaches: reading and copying in bytes/us, GEMMs in operations/us."""
    data = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_()
    other, sink = torch.empty_like(data), torch.zeros(1, dtype=torch.int32, device="cuda")
    read = ctypes.CDLL(str(reader)).read_bytes
    read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    sms = torch.cuda.get_device_properties(0).multi_processor_count

    def reads(blocks: int) -> Call:
        stream = torch.cuda.current_stream
        return lambda: read(data.data_ptr(), data.nbytes, sink.data_ptr(), blocks, stream().cuda_stream)

    a = torch.randn((8192, 8192), device="cuda", dtype=torch.bfloat16)
    i = torch.randint(-127, 128, (8192, 8192), device="cuda", dtype=torch.int8)
    best = max(data.nbytes / once(reads(sms * per_sm)) for per_sm in (2, 4, 8, 16))
    return {
        "read_bytes_per_us": best,
        "copy_bytes_per_us": 2 * data.nbytes / once(lambda: other.copy_(data)),
        "bf16_ops_per_us": 2 * 8192**3 / once(lambda: a @ a),
        "int8_ops_per_us": 2 * 8192**3 / once(lambda: torch._int_mm(i, i.T)),
    }


def once(call: Call) -> float:
    """Median microseconds of one large call."""
    times: list[float] = []
    for _ in range(12):
        start, stop = pair()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times[2:])


def case(library: Library, layer: str, m: int, weights: dict[str, Weight], failures: list[str]) -> list[Timing]:
    n, k = LAYERS[layer]
    x = torch.randn((m, k), device="cuda").half()
    rounded = {"rounded_weights": 1, "library": int(library.has_cublaslt())}
    entrants: dict[str, Callable[[], Contestant]] = {
        "int4 g128": lambda: ours(library, "int4 g128", x, weights["int4"]),
        "int8": lambda: ours(library, "int8", x, weights["int8"]),
        "int4 g128 rounded": lambda: ours(library, "int4 g128 rounded", x, weights["int4"], **rounded),
        "int4 g128 bf16": lambda: ours(library, "int4 g128 bf16", x.bfloat16(), weights["int4 bf16"]),
        "a8w8": lambda: ours(library, "a8w8", x, weights["int8"], activation_bits=8),
        "a8w4 g128": lambda: ours(library, "a8w4 g128", x, weights["int4"], activation_bits=8),
        "a8w8 g128": lambda: ours(library, "a8w8 g128", x, weights["int8 g128"], activation_bits=8),
        "cublas fp16": lambda: cublas(x, n),
        "cublas bf16": lambda: cublas(x.bfloat16(), n),
        "torch int4pack bf16": lambda: tinygemm(x.bfloat16(), weights["int4 bf16"]),
        "torch int_mm": lambda: int_mm(m, n, k),
        "humming int4": lambda: humming(x, weights["int4"]),
        "humming int8": lambda: humming(x, weights["int8 g128"]),
    }
    if m <= 16:
        del entrants["torch int_mm"]  # it takes more than 16 rows
    if Gemm(library, x, weights["int4"], rounded).plan.kernel != "dense":
        del entrants["int4 g128 rounded"]  # the table has the exact kernel here
    made = []
    for name, make in entrants.items():
        try:
            made.append(make())
            made[-1].calls[0]()
            torch.cuda.synchronize()
        except Exception as error:  # a peer that is absent or refuses a shape is recorded, and the race goes on
            made = [c for c in made if c.name != name]
            failures.append(f"{layer}, m={m}, {name}: {type(error).__name__}: {error}"[:300])
    return race(layer, m, made)


def run(library_path: Path, reader: Path, quick: bool) -> dict[str, Any]:
    library, roof = Library(library_path), roofs(reader)
    timings: list[Timing] = []
    failures: list[str] = []
    for layer in QUICK if quick else LAYERS:
        n, k = LAYERS[layer]
        half, brain = torch.float16, torch.bfloat16
        weights = {
            "int4": random_weight(n, k, 4, 128, half), "int4 bf16": random_weight(n, k, 4, 128, brain),
            "int8": random_weight(n, k, 8, k, half), "int8 g128": random_weight(n, k, 8, 128, half),
        }  # fmt: skip
        for m in ROWS:
            timings += case(library, layer, m, weights, failures)
            torch.cuda.empty_cache()
    return {
        "roofs": roof,
        "timings": [asdict(with_floor(t, roof)) for t in timings],
        "failures": sorted(set(failures)),
    }


def with_floor(t: Timing, roof: dict[str, float]) -> Timing:
    rate = roof["int8_ops_per_us"] if t.kernel.startswith(("a8", "torch int_mm")) else roof["bf16_ops_per_us"]
    floor = max(t.bytes / roof["read_bytes_per_us"], t.flops / rate)
    return replace(t, floor_us=floor, fraction=floor / t.median)


def plot(report: dict[str, Any], path: Path) -> None:
    """Time over floor against M, one line for each kernel and peer, one panel for each layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = list(dict.fromkeys(t["layer"] for t in report["timings"]))
    figure, panels = pyplot.subplots(1, len(layers), figsize=(6 * len(layers), 5), squeeze=False, sharey=True)
    for panel, layer in zip(panels[0], layers, strict=True):
        here = [t for t in report["timings"] if t["layer"] == layer]
        for kernel in dict.fromkeys(t["kernel"] for t in here):
            points = [(t["m"], t["median"] / t["floor_us"]) for t in here if t["kernel"] == kernel]
            panel.plot(*zip(*points, strict=True), marker="o", label=kernel)
        panel.set(title=layer, xscale="log", xlabel="M", ylabel="time / floor", ylim=(1, 8))
        panel.set_xticks(ROWS, [str(m) for m in ROWS])
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
