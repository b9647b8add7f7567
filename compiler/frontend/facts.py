"""What compiling needs to know of a model besides its graph, as a value that JSON holds.

It is read off the torch model once. The account, an inspection and a compilation look at nothing else, so they run
without torch where an earlier run left the facts (export_cache.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from instantrt.compiler.frontend.model import EncoderShape, Interface, LlmShape
from instantrt.compiler.frontend.rope import switches

Shape = tuple[int, ...]
OLD_NORMS = {"gamma": "weight", "beta": "bias"}  # as the first BERTs have them


@dataclass(frozen=True)
class ModelFacts:
    """A model as its config announces it.

    name        of its class
    shape       the sizes of its interface
    head        the path of the module that makes the logits, where the class names one
    parameters  name -> shape, under every name of those that are tied, in the model's order
    ties        name -> the first name of the same parameter
    buffers     name -> shape
    saved       the buffers that checkpoints have
    linears     path -> (N, K) of every linear module
    turned      those that hold their weight as [K, N]
    ignored     patterns of names that checkpoints may have and the class does not load
    renamed     name in the checkpoint -> in the model, where they differ
    chunked     name in the checkpoint -> those that equal parts of its rows have in the model, or would have
    switches    (kind, the longest sequence of the first table) of rotary tables that change
    """

    name: str
    shape: Interface
    head: str | None
    parameters: Mapping[str, Shape]
    ties: Mapping[str, str]
    buffers: Mapping[str, Shape]
    saved: Sequence[str]
    linears: Mapping[str, tuple[int, int]]
    turned: Sequence[str]
    ignored: Sequence[str]
    renamed: Mapping[str, str]
    chunked: Mapping[str, Sequence[str]]
    switches: Sequence[tuple[str, int]]

    @property
    def groups(self) -> list[list[str]]:
        """The names of each parameter: tied ones have several."""
        names: dict[str, list[str]] = {}
        for name in self.parameters:
            names.setdefault(self.ties.get(name, name), []).append(name)
        return list(names.values())

    def joined(self, parts: Sequence[str]) -> Shape | None:
        """The shape of a tensor that has these equal parts; None where they are no parameters."""
        rows, *rest = self.parameters.get(parts[0]) or [0]
        return (rows * len(parts), *rest) if rows else None

    @property
    def size(self) -> int:
        """Numbers in all parameters."""
        return sum(math.prod(self.parameters[names[0]]) for names in self.groups)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ModelFacts:
        said = json.loads(data)
        for key in ("parameters", "buffers", "linears"):
            said[key] = {name: tuple(shape) for name, shape in said[key].items()}
        interface = EncoderShape if "task" in said["shape"] else LlmShape
        return cls(**{**said, "shape": interface(**said["shape"])})


def facts_of(model: Any, shape: Interface, stored: Iterable[str], beside: Iterable[str] = ()) -> ModelFacts:
    """The facts of a torch model, for a checkpoint whose tensors have the names `stored`, in their order.

    beside   names that parameters have in the class that wrote the checkpoint, and not in this one: other heads
    """
    from transformers.pytorch_utils import Conv1D

    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    ties = {name: first.setdefault(id(parameter), name) for name, parameter in parameters.items()}
    buffers, state, head = dict(model.named_buffers()), model.state_dict(), model.get_output_embeddings()
    names = dict(model_names(model, stored))
    renamed = {old: new[0] for old, new in names.items() if len(new) == 1}
    return ModelFacts(
        name=type(model).__name__,
        shape=shape,
        head=next((path for path, module in model.named_modules() if module is head), None),
        parameters={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        ties={name: tied for name, tied in ties.items() if name != tied},
        buffers={name: tuple(buffer.shape) for name, buffer in buffers.items()},
        saved=sorted(name for name in buffers if name in state),
        linears=dict(linears(model)),
        turned=[path for path, module in model.named_modules() if isinstance(module, Conv1D)],
        ignored=sorted(
            {
                *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
                *(f"^{re.escape(n)}$" for n in beside),
            }
        ),
        renamed={old: new for old, new in renamed.items() if old != new},
        chunked={old: new for old, new in names.items() if len(new) > 1},
        switches=list(switches(model.config)),
    )


def linears(model: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """(path, (N, K)) of every linear module; GPT-2's hold their weight as [K, N]."""
    import torch
    from transformers.pytorch_utils import Conv1D

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            yield path, (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            k, n = module.weight.shape
            yield path, (int(n), int(k))


def model_names(model: Any, stored: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(name in the checkpoint, the name that the model has for it today, or several for equal parts of its rows)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, rename_source_key

    def in_chunks(rule: Any) -> bool:
        ops = rule.operations if isinstance(rule, WeightConverter) else []
        return len(ops) == 1 and isinstance(ops[0], Chunk) and (ops[0].dim, ops[0].num_shards_attribute) == (0, None)

    # Of the oldest rules, of TensorFlow's time, the norms' alone: another takes `weight_g_idx`, an order, for a norm.
    every = get_model_conversion_mapping(model, add_legacy=False)
    rules, chunks = [r for r in every if isinstance(r, WeightRenaming)], [r for r in every if in_chunks(r)]
    targets = {source: rule.target_patterns for rule in chunks for source in rule.source_patterns}
    rules += [WeightRenaming(f"LayerNorm.{old}", f"LayerNorm.{new}") for old, new in OLD_NORMS.items()]
    prefix, state = model.base_model_prefix, model.state_dict()
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    for name in stored:
        new, source = rename_source_key(name, rules, chunks, prefix, state)
        if new not in state and name in state:
            new, source = name, None
        first, *others = targets.get(source, [""])
        parts = [new, *(new.replace(first, other, 1) for other in others)]
        parts = [part if part in state else beside_a_module(part, prefix, modules) for part in parts]
        known = all(part in state or part.rpartition(".")[0] in modules for part in parts)
        yield name, parts if known or not others else [name]


def beside_a_module(name: str, prefix: str, modules: set[str]) -> str:
    """The name of a tensor that is no parameter (`qweight`, say), with its module's prefix or without it."""
    path = name.rpartition(".")[0]
    if path in modules:
        return name
    if f"{prefix}.{path}" in modules:
        return f"{prefix}.{name}"
    return name.removeprefix(f"{prefix}.") if path.removeprefix(f"{prefix}.") in modules else name
