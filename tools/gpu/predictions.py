"""What the kernels were predicted to reach before they first ran on a GPU, and a model of what they should take.

    python -m instantrt.tools.gpu.predictions LIBRARY [--bits 8] [--rows 1,8,16,64] [--batch-invariant]

prints for layers, rows of x and a GPU of each family the microseconds of the model, the weights that a multiprocessor
has on their way, in KiB, and what bounds the time; with --batch-invariant also how many times as long such products
take at the least and at the most of all layers. LIBRARY is `libinstantrt_kernels.so`, which needs no GPU to choose.

A prediction of before is a range on one kind of GPU, of the fraction of the measured read rate that the bytes of a
launch make up, of the speed of cuBLAS fp16, or of microseconds. `with a ring` says what the streaming kernels were
predicted to reach with weights in a ring of shared memory, `as they were` without: with loads straight into registers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instantrt.tools.gpu.layers import LAYERS, QUICK
from instantrt.tools.gpu.library import LaunchPlan, Library
from instantrt.tools.gpu.words import parser

FAR = 0.2  # off by more than this is named
READ, CUBLAS, MICROSECONDS = "of the read rate", "x cuBLAS fp16", "us"
BEFORE, RING = "as they were", "with a ring"
Range = tuple[float, float]
LARGE = ("qwen2-7b gate_up", "llama3-8b gate_up", "70b gate_up")
GATE_UP, DEEP = ("qwen2-7b gate_up",), ("qwen2-7b down", "llama3-8b down", "70b o", "70b gate_up")
ANY: tuple[str, ...] = ()  # layers


@dataclass(frozen=True)
class Prediction:
    """For every layer of `layers` (none: every layer) and every m of `rows`, by the name of the GPU."""

    kernel: str
    layers: tuple[str, ...]
    rows: tuple[int, int]
    unit: str
    by_gpu: Mapping[str, Range]
    of: str = BEFORE


PREDICTIONS = (
    Prediction("int4 g128", GATE_UP, (1, 1), READ, {"H200": (0.60, 0.75), "H100": (0.80, 0.90)}),
    Prediction("int4 g128", GATE_UP, (1, 1), READ, {"H200": (0.85, 0.90), "H100": (0.90, 1.0)}, RING),
    Prediction("int4 g64", GATE_UP, (1, 1), READ, {"H200": (0.55, 0.55), "H100": (0.75, 0.75)}),
    Prediction("int4 g32", GATE_UP, (1, 1), READ, {"H200": (0.40, 0.45), "H100": (0.60, 0.60)}),
    Prediction("int8", LARGE, (1, 1), READ, {"H200": (0.85, 0.85), "H100": (0.90, 0.90)}),
    Prediction("int4 g128", ("qwen2-7b o",), (1, 1), MICROSECONDS, {"H200": (4.2, 5.0), "H100": (4.5, 5.0)}),
    Prediction("int4 g128", DEEP, (16, 16), READ, {"H200": (0.40, 0.50), "H100": (0.55, 0.65)}),
    Prediction("int4 g128", ANY, (32, 32), READ, {"H200": (0.50, 0.60), "H100": (0.65, 0.75)}),
    Prediction("int4 g128", ("llama3-8b o",), (64, 64), MICROSECONDS, {"H200": (7.0, 7.5), "H100": (8.0, 8.0)}),
    Prediction("a8w8", GATE_UP, (1, 8), MICROSECONDS, {"H200": (34.0, 37.0)}, RING),
    Prediction("a8w8", GATE_UP, (16, 16), MICROSECONDS, {"H200": (35.0, 39.0)}, RING),
    Prediction("a8w8", GATE_UP, (17, 32), MICROSECONDS, {"H200": (35.0, 40.0)}, RING),
    Prediction("a8w8", ("qwen2-7b o",), (1, 16), MICROSECONDS, {"H200": (6.0, 7.5)}, RING),
    Prediction("a8w8", ("qwen2-7b down",), (1, 16), MICROSECONDS, {"H200": (18.5, 22.0)}, RING),
    Prediction("int4 g128", ANY, (512, 1 << 30), CUBLAS, {"H200": (0.75, 0.95), "H100": (0.75, 0.95)}),
)


def compare(timings: Sequence[Mapping[str, Any]], read_bytes_per_us: float, gpu: str) -> list[dict[str, Any]]:
    """A row for each prediction and timing that it is about; `off` is 0 in the range, else how far from its end."""
    cublas = {(t["layer"], t["m"]): t["median"] for t in timings if t["kernel"] == "cublas fp16"}
    found = []
    for p in PREDICTIONS:
        expected = next((r for name, r in p.by_gpu.items() if name in gpu), None)
        for t in timings:
            here = t["kernel"] == p.kernel and (not p.layers or t["layer"] in p.layers)
            if expected is None or not here or not p.rows[0] <= t["m"] <= p.rows[1]:
                continue
            measured = {
                READ: t["bytes"] / t["median"] / read_bytes_per_us,
                CUBLAS: cublas.get((t["layer"], t["m"]), float("nan")) / t["median"],
                MICROSECONDS: t["median"],
            }[p.unit]
            if measured == measured:  # noqa: PLR0124 -- not NaN: its reference was timed
                found.append({
                    "kernel": p.kernel, "layer": t["layer"], "m": t["m"], "unit": p.unit, "of": p.of,
                    "predicted": list(expected), "measured": measured, "off": off(measured, expected),
                })  # fmt: skip
    return found


def off(measured: float, expected: Range) -> float:
    """Relative distance from the nearer end of the range, negative below it."""
    nearest = min(max(measured, expected[0]), expected[1])
    return measured / nearest - 1


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those far off say so; of each prediction `as they were` and `with a ring`, one is for the kernels of today."""
    lines = [f"{'predicted':48} {'range':>13} {'measured':>9} {'off':>6}"]
    for r in rows:
        low, high = r["predicted"]
        name = f"{r['kernel']} {r['layer']} m={r['m']}, {r['of']}"
        word = f"  OFF BY OVER {FAR:.0%}" if abs(r["off"]) > FAR else ""
        lines.append(f"{name:48} {low:6.2f}-{high:6.2f} {r['measured']:9.2f} {r['off']:6.0%} {r['unit']}{word}")
    return lines


@dataclass(frozen=True)
class Card:
    """Multiprocessors, their clock under load, bytes a us that memory gives, and cycles of a multiprocessor for a
    product of 16 x 8 x 16 in fp16 with fp32 sums: four tensor cores. Of data sheets, but for the H200 (measured).
    """

    sm: int
    count: int
    mhz: int
    read: float
    product: float


GPUS = {
    "T4": Card(75, 40, 1500, 0.26e6, 4), "A100": Card(80, 108, 1410, 1.75e6, 2), "3090": Card(86, 82, 1700, 0.85e6, 8),
    "4090": Card(89, 128, 2500, 0.92e6, 8), "H200": Card(90, 132, 1780, 4.66e6, 1.6),
    "B200": Card(100, 148, 1850, 7e6, 2),
    "5090": Card(120, 170, 2400, 1.6e6, 8),
}  # fmt: skip
# Fitted to an H200's 80 times of int4 g128 and int8 of benchmarks/gpu/h200.json: cycles of a multiprocessor to issue
# what comes with a product, by the columns of 8 m of a block; microseconds of a kernel that has nothing to do, of sums
# that meet, and of what rows.cu does first. Memory's latency under load is assumed.
ISSUE, HOPPER = {1: 8.2, 2: 7.0, 4: 3.5}, 1.65
KERNEL, MEETING, SUMS, LATENCY = 3.2, 1.7, 2.0, 0.8
MEMORY, IN_FLIGHT, INSTRUCTIONS, TENSOR, WAVES, NODES = (
    "memory", "bytes in flight", "issue", "tensor cores", "waves", "launches",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    microseconds: float
    in_flight: int  # bytes of weights, of a multiprocessor
    limit: str  # MEMORY .. NODES


def estimate(plan: LaunchPlan, gpu: Card, n: int, k: int, m: int, bits: int, group: int) -> Estimate:
    """16-bit x. A multiprocessor that has the most tiles issues them one after the other, or memory is slower."""
    tiles = -(-n // plan.tile_n) * -(-m // plan.tile_m) * plan.splits
    most = -(-tiles // gpu.count)
    products = plan.tile_n / 16 * plan.tile_m / 8 * k / 16 / plan.splits
    issue = HOPPER if plan.kernel.startswith("hopper") else ISSUE[min(plan.tile_m // 8, 4)]
    read = n * k * bits / 8 + n * k / group * 4 + m * k * 2 + m * n * 2
    times = {
        MEMORY: read / gpu.read,
        IN_FLIGHT: read * LATENCY / (min(tiles, gpu.count) * plan.in_flight),
        INSTRUCTIONS: most * products * issue / gpu.mhz,
        TENSOR: most * products * gpu.product / gpu.mhz,
    }
    limit = max(times, key=lambda name: times[name])
    sums_before = plan.kernel.startswith("hopper") and plan.workspace > 0
    fixed = KERNEL + MEETING * (plan.splits > 1) + SUMS * sums_before
    if fixed > times[limit]:
        return Estimate(fixed + times[limit], plan.in_flight, NODES)
    uneven = limit in (INSTRUCTIONS, TENSOR) and most > 1.25 * tiles / gpu.count
    return Estimate(fixed + times[limit], plan.in_flight, WAVES if uneven else limit)


def estimates(
    library: Library, gpu: Card, layer: str, m: int, bits: int, group: int, batch_invariant: int = 0
) -> Estimate:
    """What `library` chooses on that GPU; `group` 0 is a whole row."""
    n, k = LAYERS[layer]
    problem = {
        "m": m, "n": n, "k": k, "group": group or k, "bits": bits, "activation_bits": 16, "sm": gpu.sm,
        "sm_count": gpu.count, "batch_invariant": batch_invariant,
    }  # fmt: skip
    return estimate(library.choose(**problem), gpu, n, k, m, bits, group or k)


def model_table(library: Library, rows: Sequence[int], bits: int, group: int) -> list[str]:
    """A line for each layer and m: microseconds/KiB in flight and the first letter of the limit, for each GPU."""
    lines = [f"{'':18} {'m':>4}" + "".join(f"{name:>11}" for name in GPUS)]
    for layer in QUICK:
        for m in rows:
            found = (estimates(library, gpu, layer, m, bits, group) for gpu in GPUS.values())
            cells = "".join(f"{e.microseconds:6.1f}/{e.in_flight // 1024:<3}{e.limit[0]}" for e in found)
            lines.append(f"{layer:18} {m:4}{cells}")
    letters = ", ".join(f"{word[0]} {word}" for word in (MEMORY, IN_FLIGHT, INSTRUCTIONS, TENSOR, WAVES, NODES))
    return [*lines, f"us/KiB of weights on their way in a multiprocessor, and the limit: {letters}"]


def invariance_table(library: Library, rows: Sequence[int], bits: int, group: int) -> list[str]:
    """For each m and GPU, of the model's times: the least and the most of batch-invariant ones by those of today."""
    lines = [f"{'batch-invariant':18} {'m':>4}" + "".join(f"{name:>11}" for name in GPUS)]
    for m in rows:
        cells = []
        for gpu in GPUS.values():
            pairs = (
                [estimates(library, gpu, layer, m, bits, group, same).microseconds for same in (0, 1)]
                for layer in QUICK
            )
            ratios = [invariant / free for free, invariant in pairs]
            cells.append(f"{f'{min(ratios):.2f}-{max(ratios):.2f}':>11}")
        lines.append(f"{'':18} {m:4}" + "".join(cells))
    return lines


def main() -> None:
    options = parser(__doc__)
    options.add_argument("library", type=Path)
    options.add_argument("--bits", type=int, choices=(4, 8), default=4, help="4: groups of 128, 8: by channel")
    options.add_argument("--rows", type=lambda text: [int(m) for m in text.split(",")], default=[1, 8, 16, 64])
    options.add_argument("--batch-invariant", action="store_true", help="also how much longer such products take")
    asked = options.parse_args()
    problem = Library(asked.library), asked.rows, asked.bits, 128 if asked.bits == 4 else 0
    print("\n".join([*model_table(*problem), *(invariance_table(*problem) if asked.batch_invariant else [])]))


if __name__ == "__main__":
    main()
