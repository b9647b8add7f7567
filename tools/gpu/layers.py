"""The layers that are timed, and how a case of a benchmark is called."""

from __future__ import annotations

import re
from collections.abc import Sequence

LAYERS = {  # name: (n, k); those of a quick run first, the ones that take longest last
    "qwen2-7b gate_up": (37888, 3584), "qwen2-7b o": (3584, 3584), "llama3-8b o": (4096, 4096),
    "qwen2-7b down": (3584, 18944), "llama3-8b gate_up": (28672, 4096), "qwen2-7b qkv": (4608, 3584),
    "llama3-8b down": (4096, 14336), "llama3-8b qkv": (6144, 4096), "qwen2-7b kv": (1024, 3584), "70b o": (8192, 8192),
    "70b gate_up": (57344, 8192), "qwen2-7b lm_head": (152064, 3584),
}  # fmt: skip
TUNED = ("int4 g128", "int8", "int8 g128", "a8w8")  # formats that tune times, unless it is told of others
HUMMING = " humming"  # behind a layer's name: a race with a peer that compiles for every shape
QUICK = tuple(LAYERS)[:8]
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
QUICK_ROWS = (1, 8, 16, 64, 512)


def names(quick: bool, own: Sequence[str] = ()) -> Sequence[str]:
    """Layers: `own` ones if there are any."""
    return own or (QUICK if quick else tuple(LAYERS))


def cases(quick: bool, own: Sequence[str] = ()) -> list[str]:
    return [f"{layer} m={m}" for layer in names(quick, own) for m in (QUICK_ROWS if quick else ROWS)]


def size(layer: str) -> tuple[int, int]:
    """n and k of one of LAYERS, or of a layer called by them: "4096x14336"."""
    if layer in LAYERS:
        return LAYERS[layer]
    n, _, k = layer.partition("x")
    return int(n), int(k)


def parse_case(name: str) -> tuple[str, int]:
    layer, _, m = name.rpartition(" m=")
    return layer, int(m)


def parse_format(name: str) -> tuple[int, int, int]:
    """Bits of codes, group (0: a whole row) and bits of activations: of "int4 g64" 4, 64, 16, of "a8w8" 8, 0, 8."""
    found = re.fullmatch(r"(int|a8w)([48])(?: g([1-9]\d*))?", name)
    if found is None or int(found[3] or 0) % 32:
        raise ValueError(
            f"{name!r}; expected int4, int8, a8w4 or a8w8, by channel, or in groups of a multiple of 32, as 'int4 g64'"
        )
    return int(found[2]), int(found[3] or 0), 8 if found[1] == "a8w" else 16
