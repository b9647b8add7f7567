"""The support table as data: what has been shown for each method and target; docs/support.md shows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from instantrt.compiler.quant.config import QuantConfig
from instantrt.compiler.target import TARGETS, Backend, Target
from instantrt.passes.core.errors import UserError


class Shown(Enum):
    """How far a cell has been shown to work; nothing is claimed that was not seen."""

    RUN = "run"  # artifacts were executed and checked
    BUILT = "built"  # an engine was built, not executed
    COMPILED = "compiled"  # lowered and written, not executed
    REFUSED = "refused"


@dataclass(frozen=True)
class Method:
    """A row of the spec's table."""

    name: str
    quant_method: str
    weight_format: str
    activate: bool
    per_channel: bool
    sub_channel: bool


@dataclass(frozen=True)
class Cell:
    shown: Shown
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.shown.value}, {self.reason}" if self.reason else self.shown.value


METHODS = (
    #      name                 quant_method     weight   activate  PerChn SubChn
    Method("IQ-INT8 (A16W8)", "instant_quant", "int8", False, True, True),
    Method("IQ-INT4 (A16W4)", "instant_quant", "uint4", False, True, True),
    Method("IQ-INT8 (A8W8)", "instant_quant", "int8", True, True, False),
    Method("GPTQ-INT8 (A16W8)", "gptq", "int8", False, True, True),
    Method("GPTQ-INT8 (A8W8)", "gptq", "int8", True, True, True),
    Method("GPTQ-INT4 (A16W4)", "gptq", "uint4", False, True, True),
    Method("GPTQ-INT4 (A8W4)", "gptq", "uint4", True, True, True),
    Method("AWQ-INT4 (A16W4)", "awq", "uint4", False, True, True),
    Method("AWQ-INT4 (A8W4)", "awq", "uint4", True, True, True),
    Method("CT-INT8 (A16W8)", "compressed-tensors", "int8", False, True, True),
    Method("CT-INT8 (A8W8)", "compressed-tensors", "int8", True, True, True),
    Method("CT-INT4 (A16W4)", "compressed-tensors", "uint4", False, True, True),
    Method("CT-INT4 (A8W4)", "compressed-tensors", "uint4", True, True, True),
    Method("INT8 (A16W8)", "int8", "int8", False, True, False),
    Method("INT8 (A8W8)", "int8", "int8", True, True, False),
    Method("GGUF, 8 bits (A16W8)", "gguf", "int8", False, False, True),
    Method("GGUF, 4 bits (A16W4)", "gguf", "uint4", False, False, True),
)


def cell(method: Method, target: Target, *, plugin: bool = False) -> Cell:
    """What has been shown for this pair; `plugin`: with our plugin library, `--plugin`."""
    if method.activate and not target.int8_mma:
        return Cell(Shown.REFUSED, "no int8 tensor cores")
    if target.backend is Backend.TENSORRT:
        return tensorrt_cell(method, target, plugin=plugin)
    if target.name.startswith("x86"):
        return Cell(Shown.RUN)
    if method.quant_method == "instant_quant":
        return Cell(Shown.RUN, "under emulation: `make test-arm`")
    return Cell(Shown.COMPILED)


def tensorrt_cell(method: Method, target: Target, *, plugin: bool) -> Cell:
    """Engines: TensorRT-RTX builds them on any machine, full TensorRT from a build kit."""
    if method.activate and method.weight_format == "uint4" and not plugin:
        return Cell(Shown.REFUSED, "no int8 by int4 product without `--plugin`")
    if not target.whole_operators:
        # int4 too: NVIDIA presented weight-only int4 with TensorRT 10.0 as independent of the architecture.
        return Cell(
            Shown.COMPILED, "build kit for TensorRT 10.0 to 10.4, none of which has parsed it here; so with `--plugin`"
        )
    limit = "" if plugin else tensorrt_limit(method, target)
    if target.rtx and (plugin or not (target.sm == 75 and method.weight_format == "uint4")):
        return Cell(Shown.BUILT, limit)
    return Cell(Shown.COMPILED, "; ".join(filter(None, ("build kit", limit))))


def tensorrt_limit(method: Method, target: Target) -> str:
    """What the builder's own tables of kernels showed of the native forms; `test_fusion.py` holds them to it."""
    if method.weight_format != "int8":
        return ""
    if method.activate:
        return "in groups only with `--plugin`" if method.sub_channel else ""
    if target.sm == 75:
        return "weights expanded on every run"
    return "groups expanded on every run" if method.sub_channel else ""


def check_supported(targets: Iterable[Target], config: QuantConfig | None, *, plugin: bool = False) -> None:
    """Refuses an unsupported pair before any work is done."""
    if config is None:
        return
    method = method_of(config)
    for target in targets:
        found = cell(method, target, plugin=plugin)
        if found.shown is Shown.REFUSED:
            near = [t.name for t in TARGETS if cell(method, t, plugin=plugin).shown is not Shown.REFUSED]
            with_plugin = cell(method, target, plugin=True).shown is not Shown.REFUSED
            raise UserError(
                f"{method.name} is not supported on {target.name} ({target.family})",
                found=found.reason,
                fix=("--plugin FILE, or " if with_plugin else "") + f"targets that run it: {', '.join(near)}",
            )


def method_of(config: QuantConfig) -> Method:
    """The row that a config is of; UserError for one that no row has."""
    key = (config.quant_method, config.weight_format, config.activate_quant)
    rows = [m for m in METHODS if m.quant_method == config.quant_method]
    found = next((m for m in rows if (m.quant_method, m.weight_format, m.activate) == key), None)
    if found is None:
        raise UserError(
            f"{config.quant_method} has no such weights and activations",
            expected=", ".join(m.name for m in rows),
            found=f"{config.weight_format} with {'int8' if config.activate_quant else 'float'} activations",
            fix="leave weight_format and compute_method to the checkpoint",
        )
    return found


def markdown() -> str:
    """The table as docs/support.md shows it: reasons as notes below, so that it fits a page."""
    header = ["method", "per-channel", "sub-channel", *(t.name for t in TARGETS)]
    notes: dict[str, int] = {}
    lines = [row(header), "|---" * len(header) + "|"]
    for m in METHODS:
        cells = []
        for found, reason in ((cell(m, t), noted(m, t)) for t in TARGETS):
            note = f" [{notes.setdefault(reason, len(notes) + 1)}]" if reason else ""
            cells.append(found.shown.value + note)
        lines.append(row([m.name, *("yes" if g else "no" for g in (m.per_channel, m.sub_channel)), *cells]))
    return "\n".join([*lines, "", *(f"[{number}] {reason}  " for reason, number in notes.items())])


def noted(method: Method, target: Target) -> str:
    """A cell's reason, and what a refused one is with the plugin."""
    found, with_plugin = cell(method, target), cell(method, target, plugin=True)
    if found.shown is Shown.REFUSED and with_plugin.shown is not Shown.REFUSED:
        return f"{found.reason}; with it: {with_plugin}"
    return found.reason


def row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print(markdown())
