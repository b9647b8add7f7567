"""The fusion gate: from the builder's table of kernels, how each quantized weight is read when the engine runs.

A fused weight goes as int4 or int8 into the kernel that multiplies with it. An expanded one is first written out as a
float matrix, on every run: small on disk, and slower than if it had not been quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), "
    r"Outputs: (?P<outputs>.*?), TacticName: .*?Metadata: (?P<metadata>.*)"
)
TYPES = re.compile(r"Datatype: (\w+)")
NODES = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
QUANTIZED = frozenset({"Int4", "Int8"})
MULTIPLIES = frozenset({"gemm", "runtime_fusion"})
WEIGHT = "/weight"  # the lowerings name a linear's DequantizeLinear <linear>/weight


class Read(Enum):
    """How a weight is read."""

    FUSED = "fused"
    EXPANDED = "expanded on every run"
    FLOAT = "stored as float"
    UNSEEN = "not in the builder's table"


@dataclass(frozen=True)
class Kernel:
    """One line of the table: types of what it reads, and the ONNX nodes it computes."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class WeightRead:
    """How one linear's weight is read, in all profiles together.

    `dtype` is the weight's type in the engine; `tokens` is "Int8" where it is multiplied with int8 activations.
    """

    linear: str
    read: Read
    dtype: str = ""
    tokens: str = "float"
    kernels: tuple[str, ...] = ()


def kernels(table: str) -> tuple[Kernel, ...]:
    """The kernels in a table of layers, as the builder logs it and the engine inspector prints it."""
    found = (LINE.match(line) for line in table.splitlines())
    return tuple(
        Kernel(
            m["name"],
            m["kind"],
            tuple(TYPES.findall(m["inputs"])),
            tuple(TYPES.findall(m["constants"])),
            tuple(NODES.findall(m["metadata"])),
        )
        for m in found
        if m
    )


def weight_reads(table: str, linears: Iterable[str]) -> tuple[WeightRead, ...]:
    """How the weight of each is read, of `linears`, the names of the quantized MatMul nodes."""
    by_node: dict[str, list[Kernel]] = {}
    for kernel in kernels(table):
        for node in kernel.nodes:
            by_node.setdefault(node, []).append(kernel)
    # A kernel of joined linears names every product, but the DequantizeLinear of one of them only.
    return tuple(weight_read(name, [*by_node.get(name + WEIGHT, []), *by_node.get(name, [])]) for name in linears)


def weight_read(linear: str, readers: list[Kernel]) -> WeightRead:
    """The verdict of the worst profile."""
    quantized = [k for k in readers if QUANTIZED & set(k.constants)]
    names = tuple(dict.fromkeys(k.name for k in quantized or readers))
    if not quantized:
        return WeightRead(linear, Read.FLOAT if readers else Read.UNSEEN, kernels=names)
    read = Read.FUSED if all(k.kind in MULTIPLIES for k in quantized) else Read.EXPANDED
    dtype = next(t for t in quantized[0].constants if t in QUANTIZED)
    tokens = "Int8" if all("Int8" in k.inputs for k in quantized) else "float"
    return WeightRead(linear, read, dtype, tokens, names)
