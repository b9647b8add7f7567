"""What the classes of a classifier are called, as config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from instantrt.passes.core.errors import FOUND, UserError


def label_names(config: Mapping[str, Any], where: str) -> dict[int, str]:
    """Number -> label; empty where config.json names none."""
    said = config.get("id2label") or {}
    if (
        not isinstance(said, dict)
        or not all(str(key).isdecimal() and len(str(key)) < 10 for key in said)
        or not all(isinstance(label, str | int | float) for label in said.values())
    ):
        found = shorten(repr(said), FOUND)
        raise UserError("id2label is no object of labels by number", where=where, found=found, fix="0 is the first")
    return {int(key): str(label) for key, label in said.items()}


def labels_of(config: Mapping[str, Any], count: int, where: str) -> list[str]:
    """The labels of a head of `count` outputs; where config.json names none, those that transformers gives them."""
    names = label_names(config, where) or {index: f"LABEL_{index}" for index in range(count)}
    if set(names) != set(range(count)):
        raise UserError(
            "id2label names other labels than the head has outputs",
            where=where,
            expected=f"labels 0 to {count - 1}",
            found=shorten(", ".join(f"{index}: {name}" for index, name in names.items()), FOUND),
            fix="give each output a label, or remove id2label",
        )
    labels = [names[index] for index in range(count)]
    if len(set(labels)) < count:
        found, fix = shorten(", ".join(labels), FOUND), "give each label a name of its own in id2label"
        raise UserError("two labels have one name", where=where, found=found, fix=fix)
    return labels
