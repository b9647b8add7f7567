"""Times WeightOnlyGemm and its peers on the layers of known models: a child of instantrt.tools.gpu.watch.

    python -m instantrt.tools.gpu.bench LIBRARY READER CASE...          cases: "roofs", "facts", "qwen2-7b o m=16"

The quantize kernel of A8W8 and A8W4 is inside its time. `floor_us` is bytes over the measured read bandwidth, or
operations over the measured rate, whichever is more; fractions are of that.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from instantrt.tools.gpu import gemm
from instantrt.tools.gpu.gemm import Gemm, Weight, random_weight
from instantrt.tools.gpu.layers import LAYERS, QUICK, parse_case
from instantrt.tools.gpu.library import LaunchPlan, Library
from instantrt.tools.gpu.race import Call, Contestant, Racer, capture, copies, once, race, ready
from instantrt.tools.gpu.watch import emit

READ_MB = (6, 17, 34, 68)  # of one launch: the weights of the smaller layers
SLOW_TO_PREPARE = (1, 16, 64, 256)  # rows at which a peer that compiles for every shape takes part
FEW_ROWS = 16  # up to which weights stream
CACHED = 40 << 20  # bytes that surely stay in the L2 cache
HOPELESS = 10  # times the best: who is slower need not run again
READ_US, BF16_US, INT8_US = 4.0e6, 7.5e8, 1.2e9  # bytes and operations per microsecond, to size graphs by
HALF, BRAIN = torch.float16, torch.bfloat16
EARLIER = {"sm": 80}  # for which kernels are launched one after the other has ended; few rows take the same ones


def contestant(name: str, calls: Iterable[Call], size: int, flops: int, plan: str = "") -> Contestant:
    rate = INT8_US if name.startswith(("a8", "torch int_mm")) else BF16_US
    return Contestant(name, list(calls), size, flops, plan, max(size / READ_US, flops / rate))


def ours(library: Library, name: str, x: torch.Tensor, weights: list[Weight], **options: int) -> Contestant:
    one, w = Gemm(library, x, weights[0], options), weights[0]
    size = w.codes.nbytes + w.affine.nbytes + len(x) * (w.n + w.k) * 2
    return contestant(name, map(one.on, weights), size, 2 * len(x) * w.n * w.k, label(one.plan))


def label(plan: LaunchPlan) -> str:
    """The row of the table, and how many parts of K it sums."""
    return plan.kernel + (f"/{plan.splits}" if plan.splits > 1 else "")


def cublas(x: torch.Tensor, weights: list[torch.Tensor]) -> Contestant:
    (m, k), n = x.shape, len(weights[0])
    y = torch.empty((m, n), device=gemm.DEVICE, dtype=x.dtype)
    calls: list[Call] = [lambda w=w: torch.matmul(x, w.T, out=y) for w in weights]  # type: ignore[misc]
    return contestant(
        "cublas fp16" if x.dtype == HALF else "cublas bf16", calls, (n * k + m * (n + k)) * 2, 2 * m * n * k
    )


def tinygemm(x: torch.Tensor, weight: Weight) -> Contestant:
    """torch._weight_int4pack_mm: w = (code - 8) * scale + zero', so zero' = (8 - zero) * scale."""
    even = (weight.natural[:, 0::2] << 4 | weight.natural[:, 1::2]).contiguous()
    packed = torch._convert_weight_to_int4pack(even, 8)
    clones = [packed, *(packed.clone() for _ in range(copies(weight.codes.nbytes) - 1))]
    scale, zero = weight.affine.float().unbind(-1)
    both = torch.stack((scale, (8 - zero) * scale), dim=-1).bfloat16().contiguous()
    calls: list[Call] = [lambda w=w: torch._weight_int4pack_mm(x, w, weight.group, both) for w in clones]  # type: ignore[misc]
    m, n, k = len(x), weight.n, weight.k
    return contestant("torch int4pack bf16", calls, weight.codes.nbytes + both.nbytes + m * (n + k) * 2, 2 * m * n * k)


def int_mm(m: int, n: int, k: int) -> Contestant:
    """torch._int_mm: int32 output, no scales; the integer GEMM alone."""
    x = torch.randint(-127, 128, (m, k), device=gemm.DEVICE, dtype=torch.int8)
    weights = [torch.randint(-127, 128, (n, k), device=gemm.DEVICE, dtype=torch.int8) for _ in range(copies(n * k))]
    calls: list[Call] = [lambda w=w: torch._int_mm(x, w.T) for w in weights]  # type: ignore[misc]
    return contestant("torch int_mm", calls, n * k + m * k + m * n * 4, 2 * m * n * k)


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
            input_config={"dtype": "float16", "group_size": 0}, torch_dtype=HALF,
        ).cuda()  # fmt: skip
        for tensor in layer.parameters():  # fresh memory is zeros, which the GPU multiplies faster
            _ = tensor.uniform_() if tensor.is_floating_point() else tensor.view(torch.uint8).random_()
        layer.transform()
        tuned = get_heuristics_config(layer.humming_metas[""])
        calls.append(lambda f=layer, t=tuned: f(inputs=x, compute_config=plain, tuning_config=t))  # type: ignore[misc]
    m, n, k = len(x), weight.n, weight.k
    size = weight.codes.nbytes + weight.affine.nbytes + m * (n + k) * 2
    return contestant(f"humming int{weight.bits}", calls, size, 2 * m * n * k)


def int8pack(x: torch.Tensor, weight: Weight) -> Contestant:
    """torch._weight_int8pack_mm: symmetric, a scale for each row of the weights."""
    packed = weight.natural.view(torch.int8)
    scale = torch.rand(weight.n, device=gemm.DEVICE).to(x.dtype)
    clones = [packed.clone() for _ in range(copies(packed.nbytes))]
    calls: list[Call] = [lambda w=w: torch._weight_int8pack_mm(x, w, scale) for w in clones]  # type: ignore[misc]
    m, n, k = len(x), weight.n, weight.k
    return contestant("torch int8pack bf16", calls, packed.nbytes + m * (n + k) * 2, 2 * m * n * k)


def roofs(reader: Path) -> dict[str, Any]:
    """What this GPU reaches: reading and copying in bytes/us, GEMMs in operations/us, an empty graph node in us."""
    data = torch.empty(4 << 30, dtype=torch.uint8, device=gemm.DEVICE).random_()
    other, sink = torch.empty_like(data), torch.zeros(1, dtype=torch.int32, device=gemm.DEVICE)
    sms = torch.cuda.get_device_properties(0).multi_processor_count

    def read(blocks: int, size: int = data.nbytes, start: int = 0) -> Call:
        return kernel(reader, "read_bytes", data.data_ptr() + start, size, sink.data_ptr(), blocks)

    def rate(size: int) -> float:
        """Bytes/us of launches that read `size` bytes each, the next of them each time, in a graph."""
        count = max(64, copies(size))
        graphs = [
            capture([read(sms * per_sm, size, i * size) for i in range(copies(size))], count) for per_sm in (1, 2, 4, 8)
        ]
        return max(size * count / once(graph.replay) for graph in graphs)

    a = torch.randn((8192, 8192), device=gemm.DEVICE, dtype=BRAIN)
    i = torch.randint(-127, 128, (8192, 8192), device=gemm.DEVICE, dtype=torch.int8)
    return {
        "read_bytes_per_us": max(data.nbytes / once(read(sms * per_sm)) for per_sm in (2, 4, 8, 16)),
        "read_bytes_per_us_by_mb": {str(mb): rate(mb << 20) for mb in READ_MB},
        "empty_node_us": once(capture([kernel(reader, "empty", sms)], 256).replay) / 256,
        "copy_bytes_per_us": 2 * data.nbytes / once(lambda: other.copy_(data)),
        "bf16_ops_per_us": 2 * 8192**3 / once(lambda: a @ a),
        "int8_ops_per_us": 2 * 8192**3 / once(lambda: torch._int_mm(i, i.T)),
        "gpu": torch.cuda.get_device_name(0),
        "cuda": torch.version.cuda,
    }


def kernel(reader: Path, name: str, *arguments: int) -> Call:
    """A launch of one of the benchmark's own kernels; what it returns is a CUDA error."""
    function = getattr(ctypes.CDLL(str(reader)), name)
    given = [ctypes.c_int64(a) for a in arguments]

    def launch() -> None:
        if status := function(*given, ctypes.c_void_p(gemm.current_stream())):
            raise RuntimeError(f"{name} failed with CUDA error {status}")

    return launch


def facts(reader: Path) -> dict[str, Any]:
    """What the design assumes of the hardware; of what cannot be found out, why."""
    found: dict[str, Any] = {}
    questions: dict[str, Callable[[], Any]] = {
        "sums of split K, us": lambda: split_sums(reader), "biased codes, error": biased_errors
    }  # fmt: skip
    for name, ask in questions.items():
        try:
            found[name] = ask()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.synchronize()
    return found


def split_sums(reader: Path) -> dict[str, float]:
    """Reading 6.4 MB, the codes of 3584 x 3584, in four parts of K whose sums meet in memory or in a cluster."""
    size, tiles, sums = 3584 * 3584 // 2, 112, {}
    data = torch.randint(0, 256, (copies(size), size), dtype=torch.uint8, device=gemm.DEVICE)
    parts, one, other = (torch.zeros((rows, tiles * 256), device=gemm.DEVICE) for rows in (4, 1, 1))
    for name, out in (("memory", one), ("cluster", other)):
        calls = [
            kernel(reader, f"sum_by_{name}", d.data_ptr(), size, parts.data_ptr(), out.data_ptr(), tiles) for d in data
        ]
        sums[name] = once(capture(calls, len(calls)).replay) / len(calls)
    if not torch.equal(one, other):
        raise AssertionError("a cluster's sums are not those of memory")
    return sums


def biased_errors() -> dict[str, float]:
    """Relative error of x (codes + bias) - bias X with fp32 sums: what tensor cores lose beside a large sum."""
    x = (torch.randn((16, 4096), device=gemm.DEVICE) + 0.5).half()
    codes = torch.randint(0, 16, (4096, 1024), device=gemm.DEVICE).half()
    truth, sums = x.double() @ codes.double(), x.double().sum(1, keepdim=True)

    def error(bias: int) -> float:
        off = torch.mm(x, codes + bias, out_dtype=torch.float32).double() - bias * sums - truth
        return float(off.norm() / truth.norm())

    return {str(bias): error(bias) for bias in (0, 64, 1024)}


@lru_cache(maxsize=1)
def layer_weights(layer: str) -> dict[str, list[Weight]]:
    """Each format of one layer, in as many copies as it takes."""
    n, k = LAYERS[layer]
    made = {
        "int4": random_weight(n, k, 4, 128, HALF), "int4 central": random_weight(n, k, 4, 128, HALF, "central"),
        "int4 bf16": random_weight(n, k, 4, 128, BRAIN), "int8": random_weight(n, k, 8, k, HALF),
        "int8 g128": random_weight(n, k, 8, 128, HALF),
    }  # fmt: skip
    return {name: [w, *(w.copy() for _ in range(copies(w.codes.nbytes) - 1))] for name, w in made.items()}


@lru_cache(maxsize=1)
def float_weights(layer: str) -> dict[torch.dtype, list[torch.Tensor]]:
    n, k = LAYERS[layer]
    count = range(copies(n * k * 2))
    return {t: [torch.randn((n, k), device=gemm.DEVICE, dtype=t) for _ in count] for t in (HALF, BRAIN)}


def entrants(library: Library, layer: str, m: int) -> dict[str, Callable[[], Contestant]]:
    (n, k), w, floats = LAYERS[layer], layer_weights(layer), float_weights(layer)
    x = torch.randn((m, k), device=gemm.DEVICE).to(HALF)
    a8, rounded = {"activation_bits": 8}, {"rounded_weights": 1, "library": int(library.has_cublaslt())}
    mine: dict[str, tuple[torch.Tensor, list[Weight], dict[str, int]]] = {
        "int4 g128": (x, w["int4"], {}),
        "int4 g128 symmetric": (x, w["int4 central"], {}),
        "int4 g128 bf16": (x.to(BRAIN), w["int4 bf16"], {}),
        "int8": (x, w["int8"], {}),
        "int8 g128": (x, w["int8 g128"], {}),
        "a8w8": (x, w["int8"], a8),
        "a8w8 g128": (x, w["int8 g128"], a8),
        "a8w4 g128": (x, w["int4"], a8),
    }

    def plan(options: dict[str, int]) -> LaunchPlan:
        return library.choose(**Gemm.problem_of(x, w["int4"][0], options))

    if plan(rounded).kernel == "dense":  # else as without
        mine["int4 g128 rounded"] = (x, w["int4"], rounded)
    if m <= FEW_ROWS and w["int4"][0].codes.nbytes <= CACHED:  # do instructions hold it up, or memory?
        mine["int4 g128 cached"] = (x, w["int4"][:1], {})
    if m <= FEW_ROWS and plan(EARLIER) == plan({}):  # what does starting beside the kernel before gain?
        mine["int4 g128 in turn"] = (x, w["int4"], EARLIER)
    every: dict[str, Callable[[], Contestant]] = {
        name: lambda name=name, t=t, weights=weights, o=o: ours(library, name, t, weights, **o)  # type: ignore[misc]
        for name, (t, weights, o) in mine.items()
    }
    every["cublas fp16"] = lambda: cublas(x, floats[HALF])
    every["cublas bf16"] = lambda: cublas(x.to(BRAIN), floats[BRAIN])
    every["torch int4pack bf16"] = lambda: tinygemm(x.to(BRAIN), w["int4 bf16"][0])
    if m > 16:  # it takes no fewer
        every["torch int_mm"] = lambda: int_mm(m, n, k)
    if layer in QUICK and m <= FEW_ROWS:
        every["torch int8pack bf16"] = lambda: int8pack(x.to(BRAIN), w["int8"][0])
    if layer in QUICK and m in SLOW_TO_PREPARE:
        every["humming int4"] = lambda: humming(x, w["int4"][0])
        every["humming int8"] = lambda: humming(x, w["int8 g128"][0])
    return every


def case(library: Library, layer: str, m: int) -> dict[str, Any]:
    """Timings of everybody who could take part, and why the others could not."""
    racers: list[Racer] = []
    failures: dict[str, str] = {}
    for name, make in entrants(library, layer, m).items():
        try:
            racers.append(ready(make()))
        except Exception as error:  # a peer that is absent or refuses a shape is recorded, and the race goes on
            failures[name] = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.synchronize()  # but an error inside a kernel ends this process
    timings = [asdict(t) for t in race(layer, m, racers, hopeless=HOPELESS)]
    torch.cuda.empty_cache()
    return {"timings": timings, "failures": failures}


def main() -> None:
    path, reader, *cases = sys.argv[1:]
    library = Library(Path(path))
    for name in cases:
        emit(start=name)
        ask = {"roofs": roofs, "facts": facts}.get(name)
        emit(end=name, outcome="passed", data=ask(Path(reader)) if ask else case(library, *parse_case(name)))


if __name__ == "__main__":
    main()
