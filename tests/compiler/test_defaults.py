"""What a request leaves open: group sizes that fit, and a head and a table in one form on CPUs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantrt.compiler.decide import asked_config
from instantrt.compiler.defaults import Formats, settle
from instantrt.compiler.plan import plan
from instantrt.compiler.request import Request
from instantrt.passes.core.lazy import InMemory
from instantrt.passes.core.linear import Linear


def settled(width: int, *, target: str = "x86", head: bool = True, **fields: Any) -> Formats:
    request = Request("m", target, "o", **fields)  # type: ignore[arg-type]
    weight = InMemory(np.zeros((2, width), np.float32))
    linears = [Linear(None, None, weight, (2, k), path) for path, k in (("a", width), ("head", 128))]  # type: ignore[arg-type]
    config, heads = asked_config(request, "instant_quant"), frozenset({"head"} if head else ())
    return settle(request, request.resolved_targets()[0], config, linears, heads, of_floats=True)


@pytest.mark.parametrize(("width", "fields", "group", "head", "tables"), [
    (576, {"quant": "a16w8"}, 64, 64, "int8"),
    (96, {"quant": "a16w8"}, 32, 32, "int8"),  # the largest that fits
    (36, {"quant": "a16w8"}, -1, 64, "int8"),
    (576, {"quant": "a16w8", "cpu_preset": "exact"}, -1, 64, "int8"),
    (576, {"quant": "a8w8"}, -1, 64, "int8"),
    (576, {"quant": "a16w8", "lm_head": "float"}, 64, None, "stored"),
    (576, {"quant": "a16w8", "head": False}, -1, None, "stored"),
    (576, {"quant": "a16w8", "target": "sm89"}, -1, None, "stored"),
    (576, {"quant_config": {"weight_format": "int8"}}, -1, None, "stored"),  # the spec's own keys
])  # fmt: skip
def test_what_is_left_open(width: int, fields: dict[str, Any], group: int, head: int | None, tables: str) -> None:
    found = settled(width, **fields)
    assert found.config is not None
    assert (found.config.group_size, found.head and found.head.group_size, found.embeddings) == (group, head, tables)
    assert bool(found.notes) is (width in (96, 36))


@pytest.mark.slow
def test_targets_of_one_type_of_scale_keep_their_own_formats(tmp_path: Path) -> None:
    """bfloat16 is that of CPUs, and of a bfloat16 checkpoint's engines."""
    fields: dict[str, Any] = {"lm_head": "float", "embeddings": "stored", "builder": "kit"}
    planned = plan(Request(Path("examples/tiny-qwen2"), ("sm89", "x86"), tmp_path, quant="a16w8", **fields))
    forms = {target: {str(q) for q in twin.quantized.values()} for target, twin in planned.twins.items()}
    assert forms == {"sm89": {"A16W8 per-channel asymmetric"}, "x86": {"A16W8 group 64 asymmetric"}}
