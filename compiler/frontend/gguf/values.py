"""Values of a GGUF file's metadata, of the type and within the bounds that are due; all else is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instantrt.passes.core.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
Vectors = Callable[[str], NDArray[np.float32]]  # name -> the numbers of a small float tensor
Sizes = Mapping[str, int]
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
        right = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        self.expect(right, key, f"an integer of {least} to {most}", value)
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive one. What float32 cannot tell from a shorter decimal is that decimal: 1e-05."""
        value = self.value(key, default)
        right = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        self.expect(right, key, "a positive number", value)
        short = np.float32(value)
        return float(str(short)) if short == value else float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.value(key, default)
        self.expect(isinstance(value, str), key, "a text", value)
        return str(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self.value(key, default)
        self.expect(isinstance(value, bool), key, "true or false", value)
        return bool(value)

    def list(self, key: str, kind: type | tuple[type, ...], default: list[Any] | None = None) -> list[Any]:
        """One whose entries are all of `kind`."""
        value: list[Any] = self.value(key, default)
        self.expect(isinstance(value, list), key, "a list", value)
        wrong = next((each for each in value if not isinstance(each, kind)), None)
        self.expect(wrong is None, key, "a list of one type", wrong)
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

    def expect(self, right: bool, key: str, expected: str, found: object = None) -> None:
        """Refuses a value that is not right: what the file has for the key, or `found`, which was made of it."""
        if not right:
            found = self.value(key) if found is None else found
            raise UserError(f"{self.prefix}.{key}", where=self.where, expected=expected, found=shown(found))

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
