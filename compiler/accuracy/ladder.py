"""The formats that a layer may take, from its own to float, and what each costs and brings: its ladder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from instantrt.compiler.accuracy.layer_errors import TwinLinear, aligned, bytes_stored, quantized_bytes
from instantrt.compiler.defaults import Groups
from instantrt.compiler.quant.config import expect
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array
from instantrt.passes.core.quant import UINT8, Quantizer, QuantTensor, dequantize
from instantrt.passes.core.rewrite import Reject
from instantrt.passes.qdq.insert_qdq import Decisions
from instantrt.plugins.weight_only_gemm.semantics import quantize_rows

FLOAT = "float"
ROWS = 64  # of a layer's inputs, on which its formats are compared


@dataclass(frozen=True)
class Format:
    """What a layer's weights may become. `group` -1 is per channel."""

    bits: int
    group: int
    activations: str = "float"

    def __str__(self) -> str:
        return f"a{8 if self.activations == 'int8' else 16}w{self.bits}:{self.group}"


@dataclass(frozen=True)
class Raise:
    """One layer, one format up: `bytes` more on disk, `gain` less loss, in nats as far as losses add up."""

    layer: str
    before: str
    after: str
    bytes: int
    gain: float


@dataclass(frozen=True)
class Rung:
    """A format of a layer: its bytes, and its squared relative output error."""

    form: str
    bytes: int
    error: float


def float_bytes(quant: QuantTensor) -> int:
    """Of the weight as the checkpoint has it."""
    return bytes_stored(quant.shape, getattr(quant.source, "weight", None))


def rungs(layer: TwinLinear, decisions: Decisions, x: Array, groups: Groups) -> list[Rung]:
    """What may become of one layer, the coarsest first, float last."""
    quant = decisions[layer.path]
    assert isinstance(quant, QuantTensor)
    found = [Rung(str(form), quantized_bytes(q), output_error(q, x)) for form, q in ladder(quant, groups)]
    return [*found, Rung(FLOAT, float_bytes(quant), 0.0)]


def ladder_steps(path: str, ladder: list[Rung], nats: float) -> Iterator[Raise]:
    """The steps of one layer that are worth taking: the corners of the convex hull of error over bytes.

    nats   what the error of the first rung costs
    """
    at, each = ladder[0], nats / max(ladder[0].error, np.finfo(np.float64).tiny)
    while better := [rung for rung in ladder if rung.bytes > at.bytes and rung.error < at.error]:
        start = at
        at = max(better, key=lambda rung: (start.error - rung.error) / (rung.bytes - start.bytes))
        yield Raise(path, start.form, at.form, at.bytes - start.bytes, each * (start.error - at.error))


def ladder(quant: QuantTensor, groups: Groups, *, coarser: bool = False) -> list[tuple[Format, QuantTensor]]:
    """The layer's own format and every finer one, coarsest first; `coarser`: those of larger groups before it."""
    k, own = quant.shape[1], form_of(quant)

    def fitting(bits: int) -> list[Format]:
        sizes = [g for g in (groups.int8 if bits == 8 else groups.uint4) if g == -1 or (k % g == 0 and g < k)]
        return [Format(bits, g) for g in sorted(sizes, key=lambda g: -(k if g == -1 else g))]

    same = [f for f in fitting(quant.bits) if f != Format(own.bits, own.group)]
    larger = [f for f in same if f.group == -1 or f.group > quant.group_size]
    finer = [f for f in same if f not in larger]
    if quant.activations == "int8":
        finer = [Format(8, -1), *finer]
    if quant.bits == 4:
        finer += fitting(8)
    return [(f, reformat(quant, f)) for f in (*(larger if coarser else ()), own, *finer)]


def form_of(quant: QuantTensor) -> Format:
    return Format(quant.bits, -1 if quant.per_channel else quant.group_size, quant.activations)


def reformat(quant: QuantTensor, form: Format) -> QuantTensor:
    """The same float weight in another format."""
    assert isinstance(quant.source, Quantizer)
    group = quant.shape[1] if form.group == -1 else form.group
    what = "the group does not divide the layer's input width"
    expect(quant.shape[1] % group == 0, str(form), what, f"a divisor of {quant.shape[1]}", quant.name)
    symmetric = form.activations == "int8"
    sizes: dict[str, Any] = {"bits": form.bits, "group_size": group, "symmetric": symmetric}
    sizes["zero_dtype"] = UINT8 if symmetric else quant.zero_dtype
    source = replace(quant.source, **sizes)
    return replace(quant, source=source, activations="int8" if symmetric else "float", **sizes)


def parse_format(text: str) -> Format:
    """`a16w4:32`, as `str(Format)` writes it."""
    mode, _, group = text.partition(":")
    return Format(int(mode[-1]), int(group), "int8" if mode.startswith("a8") else "float")


def output_error(quant: QuantTensor, x: Array) -> float:
    """(|x_hat W_hat^T - x W^T| / |x W^T|)^2 on some rows of x [..., K]; x_hat is x, or x in int8 per token."""
    rows = x.reshape(-1, x.shape[-1])
    off = size = 0.0
    for delta, exact in output_blocks(quant, rows[:: -(-len(rows) // ROWS)]):
        off += float(np.square(delta, dtype=np.float64).sum())
        size += float(np.square(exact, dtype=np.float64).sum())
    return off / max(size, np.finfo(np.float64).tiny)


def output_errors(quant: QuantTensor | Reject, x: Array) -> Array:
    """x_hat W_hat^T - x W^T: [rows of x, N]."""
    assert isinstance(quant, QuantTensor)
    return np.concatenate([delta for delta, _ in output_blocks(quant, x.reshape(-1, x.shape[-1]))], axis=1)


def output_blocks(quant: QuantTensor, rows: Array) -> Iterator[tuple[Array, Array]]:
    """(what quantization adds to x W^T, x W^T) for x [rows, K], some columns at a time."""
    assert isinstance(quant.source, Quantizer)
    seen = rows
    if quant.activations == "int8":
        steps, scale = quantize_rows(rows)
        seen = steps * scale
    for w, codes in aligned(quant.source.weight, quant):
        exact = rows @ w.T
        yield seen @ dequantize(codes, quant.group_size).T - exact, exact


def override(decisions: Decisions, layers: Mapping[str, str]) -> Decisions:
    """`decisions` with the formats that `layers` names: those a budget raised, as the manifest records them."""
    changed = dict(decisions)
    for path, name in layers.items():
        quant = changed.get(path)
        if not isinstance(quant, QuantTensor):
            raise UserError("no quantized layer of that name", where=path, found=f"format {name}")
        changed[path] = (
            Reject("the accuracy budget keeps it float") if name == FLOAT else reformat(quant, parse_format(name))
        )
    return changed
