"""What a GGUF file says of the rotary table, as transformers' rope_parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instantrt.compiler.frontend.gguf.values import Keys, Shapes, Sizes, Vectors
from instantrt.passes.core.errors import UserError

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SAME = 1e-5  # two ways to compute a factor in float32


def rotary(
    keys: Keys,
    sizes: Sizes,
    tensors: Shapes,
    vectors: Vectors,
    *,
    model_type: str,
    scalings: tuple[str, ...],
    partial: bool,
) -> dict[str, Any]:
    """transformers' rope_parameters.

    vectors   reads the factors, which are tensors
    scalings, partial   what transformers' model can do: how it scales, and whether a part of a head is rotated
    """
    base, width = keys.number("rope.freq_base", 10000.0), keys.integer("rope.dimension_count", sizes["D"])
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if width != sizes["D"]:
        part = width / sizes["D"]
        right = partial and width % 2 == 0 and int(sizes["D"] * part) == width <= sizes["D"]
        keys.expect(right, "rope.dimension_count", f"{sizes['D']}, the size of a head")
        found["partial_rotary_factor"] = part
    found |= scaling(scalings, keys, sizes, tensors, vectors, base, width)
    if model_type != "gemma3_text":
        return found
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    return {"full_attention": found, "sliding_attention": local}


def scaling(
    scalings: tuple[str, ...],
    keys: Keys,
    sizes: Sizes,
    tensors: Shapes,
    vectors: Vectors,
    base: float,
    width: int,
) -> dict[str, Any]:
    """The keys of rope_parameters that change the rotary table."""
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    factors = {
        name: factors_of(name, vectors, tensors, width, keys.where) for name in (FREQS, LONG, SHORT) if name in tensors
    }
    implied = "longrope" if LONG in factors or SHORT in factors else "linear" if factor != 1 else "none"
    kind = keys.text("rope.scaling.type", implied)
    keys.expect(kind in scalings, "rope.scaling.type", ", ".join(scalings), kind)
    due = {"longrope": {LONG, SHORT}, "none": {FREQS} & set(factors)}.get(kind, set())
    if set(factors) != due:
        raise UserError(
            f"the tensors of rotary factors do not go with the scaling {kind!r}",
            where=keys.where,
            expected=", ".join(sorted(due)) or "none",
            found=", ".join(sorted(factors)) or "none",
        )
    scaled = kind not in ("none", "linear")
    keys.expect(scaled or attention == 1, "rope.scaling.attn_factor", f"1, with the scaling {kind!r}", attention)
    keys.expect(kind != "none" or factor == 1, "rope.scaling.factor", "1, without a scaling", factor)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    if kind == "yarn":
        return yarn(keys, sizes, factor, attention)
    if kind == "longrope":
        original = keys.integer("rope.scaling.original_context_length", sizes["context"])
        return longrope(factors[LONG], factors[SHORT], attention, original)
    return llama3(factors[FREQS], base, width, sizes) if FREQS in factors else {}


def factors_of(name: str, vectors: Vectors, tensors: Shapes, width: int, where: str) -> NDArray[np.float32]:
    """One positive number for each pair of rotated features."""
    if tuple(tensors[name]) != (width // 2,):
        raise UserError(f"the shape of {name}", where=where, expected=str([width // 2]), found=str(list(tensors[name])))
    found = np.asarray(vectors(name), np.float32)
    if not (np.isfinite(found) & (found > 0)).all():
        raise UserError(f"{name}: rotary factors", where=where, expected="positive numbers", found=str(found.min()))
    return found


def yarn(keys: Keys, sizes: Sizes, factor: float, attention: float) -> dict[str, Any]:
    """YaRN. llama.cpp's attn_factor multiplies what the paper has by default."""
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", sizes["context"]),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    for key, only in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0)):
        keys.expect(keys.number(f"rope.scaling.{key}", only) == only, f"rope.scaling.{key}", str(only))
    usual = 0.1 * math.log(max(factor, 1.0)) + 1
    return found | ({"attention_factor": attention * usual} if attention != 1 else {})


def longrope(long: NDArray[np.float32], short: NDArray[np.float32], attention: float, original: int) -> dict[str, Any]:
    """One list of factors up to `original` tokens, another behind."""
    return {
        "rope_type": "longrope",
        "factor": 1.0,  # of no use beside attention_factor, but transformers warns where it is missing
        "long_factor": long.tolist(),
        "short_factor": short.tolist(),
        "attention_factor": attention,
        "original_max_position_embeddings": original,
    }


def llama3(factors: NDArray[np.float32], base: float, width: int, sizes: Sizes) -> dict[str, Any]:
    """Llama 3's scaling where it has just these factors; else a longrope whose two lists are one."""
    factor = float(factors.max())
    waves = 2 * math.pi * base ** (np.arange(0, width, 2, dtype=np.float32) / width)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((LLAMA3["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=SAME, atol=0):
        return {"rope_type": "llama3", "factor": factor, **LLAMA3} if factor != 1 else {}
    return longrope(factors, factors, 1.0, sizes["context"])
