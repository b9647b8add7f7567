"""Times WeightOnlyGemm and its peers on the layers of known models: a child of instantrt.tools.gpu.watch.

    python -m instantrt.tools.gpu.bench LIBRARY READER quick|full CASE...

Cases are "roofs", "facts", "qwen2-7b o m=16"; "qwen2-7b o humming m=16" is with a peer that compiles for each shape.

The quantize kernel of A8W8 and A8W4 is inside its time. `floor_us` is bytes over the measured read bandwidth, or
operations over the measured rate, whichever is more; fractions are of that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from instantrt.tools.gpu import gemm
from instantrt.tools.gpu.gemm import Gemm, Weight, random_weight
from instantrt.tools.gpu.layers import HUMMING, LAYERS, parse_case
from instantrt.tools.gpu.library import LaunchPlan, Library
from instantrt.tools.gpu.race import Call, Contestant, Racer, copies, once, race, ready
from instantrt.tools.gpu.roofs import facts, roofs
from instantrt.tools.gpu.tables import is_eight_bits
from instantrt.tools.gpu.watch import emit

QUICK_KERNELS = (
    "int4 g128", "int8", "a8w8", "cublas fp16", "cublas bf16", "torch int_mm",
    "torch scaled_mm fp8", "triton int4",
)  # fmt: skip
FEW_ROWS = 16  # up to which weights stream
LEAST_PRODUCT = 16  # rows from which tensor cores' products are asked for by peers
CACHED = 40 << 20  # bytes that surely stay in the L2 cache
HOPELESS = 10  # times the best: who is slower need not run again
READ_US, BF16_US, INT8_US = 4.0e6, 7.5e8, 1.2e9  # bytes and operations per microsecond, to size graphs by
HALF, BRAIN = torch.float16, torch.bfloat16
FP8, FP8_TOP = torch.float8_e4m3fn, 448


def contestant(name: str, calls: Iterable[Call], size: int, flops: int, plan: str = "") -> Contestant:
    rate = INT8_US if is_eight_bits(name) else BF16_US
    return Contestant(name, list(calls), size, flops, plan, max(size / READ_US, flops / rate))


def our_product(library: Library, name: str, x: torch.Tensor, weights: list[Weight], **options: int) -> Contestant:
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


def int8_weights(n: int, k: int) -> list[torch.Tensor]:
    return [torch.randint(-127, 128, (n, k), device=gemm.DEVICE, dtype=torch.int8) for _ in range(copies(n * k))]


def int_mm(m: int, weights: list[torch.Tensor]) -> Contestant:
    """torch._int_mm: int32 output, no scales; the integer GEMM alone."""
    n, k = weights[0].shape
    x = torch.randint(-127, 128, (m, k), device=gemm.DEVICE, dtype=torch.int8)
    calls: list[Call] = [lambda w=w: torch._int_mm(x, w.T) for w in weights]  # type: ignore[misc]
    return contestant("torch int_mm", calls, n * k + m * k + m * n * 4, 2 * m * n * k)


def fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and a scale for each row."""
    scale = x.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / FP8_TOP
    return (x.float() / scale).to(FP8), scale


def fp8_weights(n: int, k: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    values, scale = fp8(torch.randn((n, k), device=gemm.DEVICE, dtype=BRAIN))
    return [(values.clone(), scale) for _ in range(copies(n * k))]


def scaled_mm(x: torch.Tensor, weights: list[tuple[torch.Tensor, torch.Tensor]]) -> Contestant:
    """torch._scaled_mm, a scale for each row of x and of the weights; x is in fp8 before: the GEMM alone."""
    (m, k), n = x.shape, len(weights[0][0])
    values, scale = fp8(x)
    calls: list[Call] = [
        partial(
            torch._scaled_mm, values, w.T, scale_a=scale, scale_b=s.T, out_dtype=BRAIN, use_fast_accum=True
        )
        for w, s in weights
    ]  # fmt: skip
    return contestant("torch scaled_mm fp8", calls, n * k + 4 * (n + m) + m * k + m * n * 2, 2 * m * n * k)


def triton_weights(weight: Weight) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    from instantrt.tools.gpu import triton_gemm

    codes = triton_gemm.pack(weight.natural)
    scales, zeros = (part.contiguous() for part in weight.affine.unbind(-1))
    return [codes.clone() for _ in range(copies(codes.nbytes))], scales, zeros


def triton_int4(x: torch.Tensor, weights: tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]) -> Contestant:
    """A plain Triton kernel, in the fastest of a few configurations."""
    from instantrt.tools.gpu import triton_gemm

    codes, scales, zeros = weights
    (m, k), n = x.shape, len(codes[0])
    y = torch.empty((m, n), device=gemm.DEVICE, dtype=x.dtype)

    def call(config: tuple[int, int], one: torch.Tensor) -> Call:
        return partial(triton_gemm.launch, x, one, scales, zeros, y, config)

    times, refused = {}, ""
    for config in triton_gemm.CONFIGS:
        try:
            call(config, codes[0])()  # compiles
            times[config] = once(call(config, codes[0]))
        except Exception as error:  # too much shared memory for the others' loads in flight, for one
            refused = f"{type(error).__name__}: {error}"
    if not times:
        raise RuntimeError(f"no configuration runs: {refused}")
    best = min(times, key=times.__getitem__)
    size = codes[0].nbytes + scales.nbytes + zeros.nbytes + m * (n + k) * 2
    return contestant("triton int4", [call(best, one) for one in codes], size, 2 * m * n * k, f"{best[0]}x{best[1]}")


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


STORED: dict[str, tuple[int, int, torch.dtype, str]] = {  # bits, group (0: a whole row), type, kind of zeros
    "int4": (4, 128, HALF, "float"), "int4 central": (4, 128, HALF, "central"), "int4 bf16": (4, 128, BRAIN, "float"),
    "int4 g64": (4, 64, HALF, "float"), "int4 g32": (4, 32, HALF, "float"),
    "int8": (8, 0, HALF, "float"), "int8 g128": (8, 128, HALF, "float"),
}  # fmt: skip
Made = TypeVar("Made")


@lru_cache(maxsize=1)
def made_of(layer: str) -> dict[Hashable, Any]:  # noqa: ARG001 -- it is the cache's key
    """What is made for one layer and serves all its rows; the last layer's goes."""
    return {}


def made(layer: str, key: Hashable, make: Callable[[], Made]) -> Made:
    there = made_of(layer)
    if key not in there:
        there[key] = make()
    return there[key]  # type: ignore[no-any-return]


def weights_of(layer: str, name: str) -> list[Weight]:
    """One format of one layer, in as many copies as it takes."""

    def make() -> list[Weight]:
        (n, k), (bits, group, dtype, zeros) = LAYERS[layer], STORED[name]
        w = random_weight(n, k, bits, group or k, dtype, zeros)
        return [w, *(w.copy() for _ in range(copies(w.codes.nbytes) - 1))]

    return made(layer, name, make)


def float_weights(layer: str, dtype: torch.dtype) -> list[torch.Tensor]:
    n, k = LAYERS[layer]
    count = range(copies(n * k * 2))
    return made(layer, dtype, lambda: [torch.randn((n, k), device=gemm.DEVICE, dtype=dtype) for _ in count])


def entrants(library: Library, layer: str, m: int) -> dict[str, Callable[[], Contestant]]:
    n, k = LAYERS[layer]
    x = torch.randn((m, k), device=gemm.DEVICE).to(HALF)
    a8, rounded = {"activation_bits": 8}, {"rounded_weights": 1, "library": int(library.has_cublaslt())}
    mine: dict[str, tuple[torch.Tensor, str, dict[str, int]]] = {
        "int4 g128": (x, "int4", {}),
        "int4 g128 symmetric": (x, "int4 central", {}),
        "int4 g128 bf16": (x.to(BRAIN), "int4 bf16", {}),
        "int4 g64": (x, "int4 g64", {}),
        "int4 g32": (x, "int4 g32", {}),
        "int8": (x, "int8", {}),
        "int8 g128": (x, "int8 g128", {}),
        "a8w8": (x, "int8", a8),
        "a8w8 g128": (x, "int8 g128", a8),
        "a8w4 g128": (x, "int4", a8),
    }
    int4 = weights_of(layer, "int4")[0]

    def plan(options: dict[str, int]) -> LaunchPlan:
        return library.choose(**Gemm.problem_of(x, int4, options))

    if plan(rounded).kernel == "dense":  # else as without
        mine["int4 g128 rounded"] = (x, "int4", rounded)
    every: dict[str, Callable[[], Contestant]] = {
        name: lambda name=name, t=t, w=w, o=o: our_product(library, name, t, weights_of(layer, w), **o)  # type: ignore[misc]
        for name, (t, w, o) in mine.items()
    }
    if m <= FEW_ROWS and int4.codes.nbytes <= CACHED:  # do instructions hold it up, or memory?
        every["int4 g128 cached"] = lambda: our_product(library, "int4 g128 cached", x, [int4])
    every["cublas fp16"] = lambda: cublas(x, float_weights(layer, HALF))
    every["cublas bf16"] = lambda: cublas(x.to(BRAIN), float_weights(layer, BRAIN))
    every["torch int4pack bf16"] = lambda: tinygemm(x.to(BRAIN), weights_of(layer, "int4 bf16")[0])
    if m > 16:  # it takes no fewer
        every["torch int_mm"] = lambda: int_mm(m, made(layer, "int_mm", lambda: int8_weights(n, k)))
    if m >= LEAST_PRODUCT:
        every["torch scaled_mm fp8"] = lambda: scaled_mm(x, made(layer, "fp8", lambda: fp8_weights(n, k)))
        every["triton int4"] = lambda: triton_int4(x, made(layer, "triton", lambda: triton_weights(int4)))
    if m <= FEW_ROWS:
        every["torch int8pack bf16"] = lambda: int8pack(x.to(BRAIN), weights_of(layer, "int8")[0])
    return every


def compiled(library: Library, layer: str, m: int, quick: bool) -> dict[str, Callable[[], Contestant]]:
    """humming-kernels, and ours once more beside them."""
    x = torch.randn((m, LAYERS[layer][1]), device=gemm.DEVICE).to(HALF)
    every: dict[str, Callable[[], Contestant]] = {
        "int4 g128 again": lambda: our_product(library, "int4 g128 again", x, weights_of(layer, "int4")),
        "humming int4": lambda: humming(x, weights_of(layer, "int4")[0]),
    }
    if not quick:
        every["humming int8"] = lambda: humming(x, weights_of(layer, "int8 g128")[0])
    return every


def case(library: Library, layer: str, m: int, quick: bool = False) -> dict[str, Any]:
    """Timings of everybody who could take part, and why the others could not."""
    racers: list[Racer] = []
    failures: dict[str, str] = {}
    if layer.endswith(HUMMING):
        layer = layer.removesuffix(HUMMING)
        every = compiled(library, layer, m, quick)
    else:
        every = entrants(library, layer, m)
        every = {name: make for name, make in every.items() if not quick or name in QUICK_KERNELS}
    for name, make in every.items():
        try:
            racers.append(ready(make()))
        except Exception as error:  # a peer that is absent or refuses a shape is recorded, and the race goes on
            failures[name] = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.synchronize()  # but an error inside a kernel ends this process
    timings = [asdict(t) for t in race(layer, m, racers, hopeless=HOPELESS)]
    torch.cuda.empty_cache()
    return {"timings": timings, "failures": failures}


def main() -> None:
    path, reader, how, *cases = sys.argv[1:]
    library, quick = Library(Path(path)), how == "quick"
    for name in cases:
        emit(start=name)
        ask = {"roofs": roofs, "facts": facts}.get(name)
        emit(end=name, outcome="passed", data=ask(Path(reader)) if ask else case(library, *parse_case(name), quick))


if __name__ == "__main__":
    main()
