"""What a GPU reaches, and what the kernels' design assumes of it: the cases "roofs" and "facts" of bench.py."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from instantrt.tools.gpu import gemm
from instantrt.tools.gpu.race import Call, capture, copies, once

READ_MB = (6, 17, 34, 68)  # of one launch: the weights of the smaller layers


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

    a = torch.randn((8192, 8192), device=gemm.DEVICE, dtype=torch.bfloat16)
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
        "sums of split K, us": lambda: split_sums(reader), "biased codes, error": biased_errors,
        "clusters of blocks of 200 KiB": lambda: most_clusters(reader),
    }  # fmt: skip
    for name, ask in questions.items():
        try:
            found[name] = ask()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.synchronize()
    return found


def most_clusters(reader: Path) -> dict[str, int]:
    """How many clusters of so many blocks run at one time where a multiprocessor has room for one block."""
    library = ctypes.CDLL(str(reader))
    return {
        str(blocks): library.most_clusters(ctypes.c_int64(blocks), ctypes.c_int64(200 << 10)) for blocks in (2, 4, 8)
    }


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

    tiny = torch.mm(x, codes * 2.0**-24, out_dtype=torch.float32).double() * 2.0**24 - truth  # below the normal range
    return {**{str(bias): error(bias) for bias in (0, 64, 1024)}, "0, times 2^-24": float(tiny.norm() / truth.norm())}
