"""Names that the smoke run shares with the process it starts, which imports little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LOGITS, PRESENT, PAST = "logits", "present.", "past_key_values."
CACHED = "cached"  # how the steps of both rows in one cache begin


def past(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The cache that a step leaves, as the next one takes it."""
    return {PAST + name.removeprefix(PRESENT): v for name, v in outputs.items() if name.startswith(PRESENT)}
