"""What a request leaves open, by target and model: one table, with the measurements that decided it beside it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

from instantrt.compiler.options import HeadFormat, TableFormat
from instantrt.compiler.quant.config import QuantConfig, Search
from instantrt.compiler.quant.instant import GROUPS, fits
from instantrt.compiler.request import Request
from instantrt.compiler.target import Backend, Target
from instantrt.passes.core.linear import Linear
from instantrt.passes.ort import Preset
from instantrt.passes.qdq.tables import TABLE_BLOCKS


@dataclass(frozen=True)
class Defaults:
    """What is not said: group sizes of 8 and 4 bit weights, -1 per channel, and the search of the latter's scales; what
    becomes of the head and the table of embeddings."""

    int8: int
    uint4: int
    search: Search = "none"
    lm_head: HeadFormat = "float"
    embeddings: TableFormat = "stored"


SPEC = Defaults(-1, -1)  # of the spec's own keys, and of engines: the forms that TensorRT fuses
OTHERS = Defaults(-1, 32)  # many rows meet the weights: integer products of whole channels are the fastest
# Of texts, where 16-bit activations are asked for to keep the vectors: docs/facts.md, "Formats of an encoder".
ENCODER = Defaults(32, 32, "activations")
# By `instantrt bench formats defaults` (benchmarks/defaults.json), a 135 M model, KL to float in nats and MiB:
#                auto           fast           exact
#   per channel                 0.0086  135    0.0029  131
#   groups of 64 0.0054  135    0.0069  135    0.0017  136
#   groups of 32 0.0033  141    0.0041  141    0.0012  142
# 4 bits, auto, scales searched: 0.148 and 89 MiB in groups of 32, 0.194 and 84 in groups of 64.
# Zero points are integers for every target: float ones lower the error of the weights and raise that of the model, as 0
# is no code then. 4 bits, auto, formula, off every grid, KL and MiB: 0.285 and 89 against 0.473 and 94 in groups of 32,
# 0.346 and 84 against 0.870 and 87 in groups of 64. 8 bits: no difference. A token on a CPU takes a quarter longer.
CAUSAL: dict[Preset, Defaults] = {
    "auto": Defaults(64, 32, "activations", "int8", "int8"),
    "fast": Defaults(64, 32, "activations", "int8", "int8"),
    "exact": Defaults(-1, 32, "activations", "int8", "int8"),  # whole channels: integer products for long prompts, too
}


class Groups(NamedTuple):
    """Sizes that a layer may get where formats are chosen layer by layer; -1 is per channel."""

    uint4: tuple[int, ...]
    int8: tuple[int, ...]


EVERY_GROUP = Groups(GROUPS, (-1, *GROUPS))
OF_CPUS = Groups((*GROUPS, 16), (-1, *GROUPS, 16))
FUSED = Groups(GROUPS, (-1,))  # docs/facts.md, "Which weights TensorRT fuses"
SMALLER = (64, 32, 16)  # for what a default, or a head's layers, do not divide: all operators have these


@dataclass(frozen=True)
class Formats:
    """How a model is quantized for one target, nothing left open.

    target       its name, for errors
    heads        paths of the linears that make a language model's logits
    config       None: linears stay float
    head         how a head is quantized; None: it stays float
    groups       the sizes that a layer may get where formats are chosen layer by layer
    """

    target: str
    heads: Set[str]
    config: QuantConfig | None
    head: QuantConfig | None
    embeddings: TableFormat
    notes: tuple[str, ...] = ()
    groups: Groups = EVERY_GROUP


def settle(
    request: Request,
    target: Target,
    config: QuantConfig | None,
    linears: Iterable[Linear],
    heads: Set[str],
    *,
    of_floats: bool,
    of_texts: bool = False,
) -> Formats:
    """What the request says, and the table where it says nothing.

    of_floats   the checkpoint is not quantized yet
    of_texts    the model is an encoder, which reads texts
    """
    if config is None or not of_floats:
        return Formats(target.name, heads, config, None, request.embeddings or "stored")
    widths = {found.path: found.shape[1] for found in linears if config.ignored(found.path) is None}
    own_heads = {path: k for path, k in widths.items() if path in heads}
    on_cpu = target.backend is Backend.ONNXRUNTIME
    chosen = SPEC
    if on_cpu and request.quant_config is None:
        chosen = ENCODER if of_texts else CAUSAL[request.cpu_preset] if heads else OTHERS
    groups = OF_CPUS if on_cpu else FUSED if request.plugin is None else EVERY_GROUP
    notes: tuple[str, ...] = ()
    if request.group_size is None and request.quant_config is None and not config.activate_quant:
        wanted = chosen.int8 if config.bits == 8 else chosen.uint4
        config = replace(config, group_size=largest(widths.values(), wanted))
        if config.group_size != wanted:
            unfit = next(f"{path}, {k} inputs" for path, k in widths.items() if not fits(k, wanted))
            why = f"{wanted}, the default, does not divide {unfit}"
            notes = (f"{target.name}: group_size {config.group_size}, because {why}",)
    if request.search is None and request.quant_config is None:
        # Loud inputs (docs/facts.md, "Loud inputs of a causal LM"): random tokens tell of them, random numbers do not.
        if config.activate_quant and (of_texts or heads):
            config = replace(config, search="activations")
        elif of_texts or config.bits == 4:
            config = replace(config, search=chosen.search)
    lm_head = request.lm_head or (chosen.lm_head if own_heads else "float")
    if lm_head == "float":
        return Formats(target.name, heads, config, None, request.embeddings or "stored", notes, groups)
    head = replace(config, weight_format="int8", zero_point="integer")  # as a table of embeddings has them
    if on_cpu:  # in groups that a table may have, too
        size = largest(own_heads.values(), config.group_size if config.group_size in TABLE_BLOCKS else SMALLER[0])
        head = replace(head, compute_method="weight_only", group_size=size)
    return Formats(target.name, heads, config, head, request.embeddings or chosen.embeddings, notes, groups)


def largest(widths: Collection[int], wanted: int) -> int:
    """The size of groups, at most `wanted`, that fits all."""
    sizes = (wanted, *(size for size in SMALLER if size < wanted))
    return next((size for size in sizes if all(fits(k, size) for k in widths)), -1)
