"""The kernels' C interface, plugins/weight_only_gemm/kernel.h, through ctypes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


HUNG_ROWS = "INSTANTRT_HUNG_ROWS"  # environment: rows of the table not to launch: "NAME sm=SM,..."
I32, I64, PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
CProblem = structure(
    "CProblem", m=I64, n=I32, k=I32, group=I32, bits=I32, type=I32, activation=I32, gated=I32, activation_bits=I32,
    sm=I32, sm_count=I32, wide=I32, plain=I32, rounded_weights=I32, library=I32, row=I32, splits=I32,
    batch_invariant=I32,
)  # fmt: skip
CTensors = structure("CTensors", x=PTR, codes=PTR, affine=PTR, bias=PTR, y=PTR, workspace=PTR)
CPlan = structure(
    "CPlan", kernel=ctypes.c_char_p, row=I32, splits=I32, grid_m=I32, grid_n=I32, threads=I32, shared=I32,
    workspace=I64, tile_m=I32, tile_n=I32, resident=I32, in_flight=I32,
)  # fmt: skip


class LaunchRefusedError(Exception):
    """The C function returned an error; the message is its own."""


@dataclass(frozen=True)
class LaunchPlan:
    """`kernel` names the row of the table that serves the problem, `row` is its index."""

    kernel: str
    row: int
    splits: int
    grid_m: int
    grid_n: int
    threads: int
    shared: int
    workspace: int
    tile_m: int
    tile_n: int
    resident: int
    in_flight: int


class Library:
    """wog_choose, wog_workspace and wog_launch of one shared library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = ctypes.CDLL(str(path))
        self._c.wog_workspace.restype = I64
        self._c.wog_row_name.restype = ctypes.c_char_p

    def _call(self, function: str, *args: Any) -> None:
        message = ctypes.create_string_buffer(256)
        if getattr(self._c, function)(*args, message, ctypes.c_size_t(256)):
            raise LaunchRefusedError(message.value.decode())

    def choose(self, **problem: int) -> LaunchPlan:
        plan = CPlan()
        self._call("wog_choose", ctypes.byref(CProblem(**problem)), ctypes.byref(plan))
        return LaunchPlan(plan.kernel.decode(), *(getattr(plan, f) for f in list(LaunchPlan.__annotations__)[1:]))

    def rows(self) -> list[str]:
        """Names of the table's rows; a problem's `row` is an index into them plus 1."""
        return [self._c.wog_row_name(i).decode() for i in range(self._c.wog_rows())]

    def plans(self, splits: tuple[int, ...] = (0,), **problem: int) -> list[LaunchPlan]:
        """One plan for each row of the table that can serve the problem and each way that it can split K."""
        found: dict[tuple[int, int], LaunchPlan] = {}
        for row, parts in product(range(len(self.rows())), splits):
            try:
                plan = self.choose(**{**problem, "row": row + 1, "splits": parts})
            except LaunchRefusedError:
                continue
            found.setdefault((plan.row, plan.splits), plan)
        return list(found.values())

    def has_cublaslt(self) -> bool:
        return bool(self._c.wog_library())

    def workspace(self, **problem: int) -> int:
        return int(self._c.wog_workspace(ctypes.byref(CProblem(**problem))))

    def launch(self, problem: dict[str, int], tensors: dict[str, int], stream: int = 0) -> None:
        c = CTensors(**{k: v or None for k, v in tensors.items()})
        self._call("wog_launch", ctypes.byref(CProblem(**problem)), ctypes.byref(c), PTR(stream))
