"""Values of a GGUF file's metadata, of the type and within the bounds that are due; all else is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from instantrt.passes.core.errors import UserError

MOST = 2**31 - 1  # of any size: more than any model has


class Keys:
    """The metadata below one prefix. It remembers what it was asked for: the rest is not used, and nobody's.

    A method takes the key behind the prefix, and gives `default` where the file has none; without a default, a missing
    key is refused.
    """

    def __init__(self, metadata: Mapping[str, Any], prefix: str, where: str) -> None:
        self.metadata, self.prefix, self.where = metadata, prefix, where
        self.asked: set[str] = set()

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = MOST) -> int:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.refusal(key, f"an integer of {least} to {most}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive one. What float32 cannot tell from a shorter decimal is that decimal: 1e-05."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.refusal(key, "a positive number", value)
        short = np.float32(value)
        return float(str(short)) if short == value else float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.value(key, default)
        if not isinstance(value, str):
            raise self.refusal(key, "a text", value)
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false", value)
        return value

    def list(self, key: str, kind: type | tuple[type, ...], default: list[Any] | None = None) -> list[Any]:
        """One whose entries are all of `kind`."""
        value = self.value(key, default)
        if not isinstance(value, list):
            raise self.refusal(key, "a list", value)
        wrong = next((each for each in value if not isinstance(each, kind)), None)
        if wrong is not None:
            raise self.refusal(key, "a list of one type", wrong)
        return value

    def value(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise UserError(f"the metadata lacks {self.prefix}.{key}", where=self.where)
        return value

    def __contains__(self, key: str) -> bool:
        self.asked.add(key)
        return f"{self.prefix}.{key}" in self.metadata

    def refusal(self, key: str, expected: str, found: object) -> UserError:
        return UserError(f"{self.prefix}.{key}", where=self.where, expected=expected, found=shown(found))

    def refuse_rest(self, harmless: Mapping[str, str]) -> None:
        """Refuses the first key of the prefix that was not asked for and is not `harmless`."""
        known = self.asked | set(harmless)
        for key in self.metadata:
            own = key.removeprefix(f"{self.prefix}.")
            if own != key and own not in known:
                raise UserError(
                    f"{key}: nothing is known to do with it",
                    where=self.where,
                    expected=f"keys of {self.prefix}: {', '.join(sorted(known))}",
                    found=shown(self.metadata[key]),
                )


def shown(value: object) -> str:
    """A value of the file for an error: its beginning, or its length."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value[:200]) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
