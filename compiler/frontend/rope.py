"""Rotary tables that depend on the length of the sequence: an artifact has one table, so it has one length.

transformers chooses the table anew in each call, by the longest sequence of the batch, and drops its cache where the
choice changes. A graph has neither: keys that were rotated by one table stay in a cache, and rows of a batch would get
the table of their neighbours. Up to a length the table is the same for all, and there an artifact is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instantrt.passes.core.errors import UserError

ONE_TABLE = ("default", "linear", "proportional", "llama3", "yarn")
# Kind -> (config, its parameters) -> the longest sequence of the first table.
SWITCHES: Mapping[str, Callable[[Any, Mapping[str, Any]], int]] = {
    "longrope": lambda config, given: int(given["original_max_position_embeddings"]),
    "dynamic": lambda config, given: int(config.max_position_embeddings),
}


def switches(config: Any, where: str = "") -> list[tuple[str, int]]:
    """(kind, the longest sequence of its first table) of the tables that change; refuses unknown kinds."""
    text, found = config.get_text_config(), []
    known = {*ONE_TABLE, getattr(text, "default_rope_type", "default")}
    for kind, given in kinds(text):
        if kind in SWITCHES:
            found.append((kind, SWITCHES[kind](text, given)))
        elif kind not in known:
            raise UserError(
                "a rope_type that is not known",
                where=where,
                expected=", ".join(sorted({*known, *SWITCHES})),
                found=repr(kind),
            )
    return found


def check_length(switches: Sequence[tuple[str, int]], max_length: int | None, where: Path) -> None:
    """Refuses a table that changes within `max_length` tokens, None: as many as the model can."""
    for kind, switch in switches:
        if max_length is None or max_length > switch:
            raise UserError(
                f'rope_type "{kind}": the rotary table changes with the length of the sequence',
                where=str(where),
                expected=f"sequences of at most {switch} tokens, which have one table",
                found="no --max-length" if max_length is None else f"up to {max_length} tokens",
                fix=f"--max-length {switch}, or less",
            )


def kinds(text: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each kind of rotary embedding with its parameters: one for the model, or one for each kind of layer."""
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [each for each in given.values() if isinstance(each, Mapping)]
    for each in nested or [given]:
        yield str(each.get("rope_type") or each.get("type") or "default"), each


def keep_first_table(model: Any) -> None:
    """Its rotary modules stay with the table that they were made with, that of short sequences."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, Mapping):
            module.rope_type = {layers: first(each) for layers, each in kind.items()}
        elif kind is not None:
            module.rope_type = first(kind)


def first(kind: str) -> str:
    """transformers changes no table of the kind `default`."""
    return "default" if kind in SWITCHES else kind
