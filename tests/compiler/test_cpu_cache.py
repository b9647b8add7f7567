"""What the cache of an artifact on CpuAttention holds: by default, as it is asked for, and where that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from instantrt import LLM
from instantrt.compiler.accuracy.metrics import difference
from instantrt.compiler.compile import compile_model
from instantrt.compiler.request import Request
from instantrt.compiler.serving.runtime.onnx_engine import ENGINES, SharedEngine
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array
from tests.compiler.rows import rows_of
from tests.conftest import TINY
from tests.models import make

PROMPT, MORE = np.array([5, 77, 1234, 900, 31, 8, 400]), (12, 2048, 3)


def logits_of(out: Path, **given: Any) -> tuple[set[str], Array]:
    """The types of the cache, and what follows a prompt and each of three tokens."""
    (artifact,) = compile_model(Request(TINY, ("x86",), out, **given))
    libraries = [out / name for name in artifact.plugins]
    engine = SharedEngine(out / artifact.path, 1, 64, 1, libraries=libraries)
    found = [np.array(engine.prefill(0, PROMPT, 0))]
    for at, token in enumerate(MORE):
        found.append(np.array(engine.decode(np.array([token]), np.array([len(PROMPT) + at]))[0]))
    return {t.dtype for t in artifact.inputs if t.name.startswith("past")}, np.stack(found)


@pytest.mark.slow
def test_what_is_asked_for(tmp_path: Path, cpu_library: Path) -> None:
    """float16 is what no other rounding hides, int8 what costs little; both are written, and read, as they are."""
    given = {"quant": "a16w8", "cpu_preset": "exact", "plugin": cpu_library}
    types, wide = logits_of(tmp_path / "float32", **given)
    assert types == {"float32"}, "exact rounds nothing more"
    for kind, holds, least, most in (
        ("float16", {"float16"}, 1e-6, 1e-3),
        ("int8", {"int8"}, 1e-4, 3e-2),
        ("uint4", {"uint8", "float16"}, 1e-2, 2e-1),
    ):
        types, narrow = logits_of(tmp_path / kind, kv_cache_type=kind, **given)
        assert types == holds
        assert least < difference(narrow, wide).relative_l2 < most
    for kind in ("int8", "uint4"):
        with LLM(tmp_path / kind, threads=1) as llm:
            found = llm.generate(["Once upon a time", "The list"], max_tokens=8, min_tokens=8)
        assert [len(each.tokens) for each in found] == [8, 8]


@pytest.mark.slow
def test_four_bits_are_those_of_standard_operators(tmp_path: Path, cpu_library: Path) -> None:
    """In one buffer, as it cannot be there: a prompt in pieces, rows of different lengths."""
    found = []
    for name, cache, given in (("ours", "shared", {"plugin": cpu_library}), ("standard", "concat", {})):
        request = Request(TINY, ("x86",), tmp_path / name, cpu_preset="exact", kv_cache_type="uint4", **given)
        (artifact,) = compile_model(request)
        assert artifact.limits["cache"] == cache
        libraries = [tmp_path / name / library for library in artifact.plugins]
        engine = ENGINES[cache](tmp_path / name / artifact.path, 2, 16, 1, libraries=libraries)
        found.append(rows_of(engine))
        engine.close()
    for ours, standard in zip(*found, strict=True):
        assert difference(ours, standard).relative_l2 < 1e-2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"head_dim": 24}, "24 channels in 1 groups, expected at most 32 of a multiple of 16"),
        ({"head_dim": 32}, ""),
    ],
    ids=["24 channels", "32 channels"],
)
def test_four_bits_that_the_kernels_do_not_have_stay(given: Any, says: str, tmp_path: Path, cpu_library: Path) -> None:
    """As standard operators, which the dump of passes explains."""
    make("llama", tmp_path / "llama", **given)
    more: Any = {"quant": "a16w8", "group_size": 32, "plugin": cpu_library, "kv_cache_type": "uint4"}
    (artifact,) = compile_model(Request(tmp_path / "llama", ("x86",), tmp_path / "out", **more))
    ops = {node.op_type for node in onnx.load(tmp_path / "out" / artifact.path, load_external_data=False).graph.node}
    assert ("CpuAttentionByToken" in ops) == (not says)
    assert ("Softmax" in ops or "Attention" in ops) == bool(says)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"quant": "a16w8"}, "float16"),
        ({"quant": "a16w8", "kv_cache_type": "float32"}, "float32"),
        ({"quant": "none"}, "float32"),
    ],
    ids=["int8 activations", "float32", "floats"],
)
def test_what_it_holds_by_itself(given: Any, expected: str, tmp_path: Path, cpu_library: Path) -> None:
    """Half the bytes where products round more than float16 does."""
    types, _ = logits_of(tmp_path / "out", plugin=cpu_library, **given)
    assert types == {expected}


def test_floats_are_right_over_float16(tmp_path: Path, cpu_library: Path) -> None:
    """What a cache rounds is no error of an artifact whose products round nothing; this one's logits lose 4e-4."""
    make("phi3-partial", tmp_path / "phi3", sliding_window=None, head_dim=64, hidden_size=256)
    given = {"quant": "none", "plugin": cpu_library, "kv_cache_type": "float16"}
    (artifact,) = compile_model(Request(tmp_path / "phi3", ("x86",), tmp_path / "out", **given))
    assert {t.dtype for t in artifact.inputs if t.name.startswith("past")} == {"float16"}


def test_float16_wants_attention_of_ours(tmp_path: Path, cpu_library: Path) -> None:
    """Heads of 24 channels are ONNX Runtime's, whose operator has no such cache."""
    make("llama", tmp_path / "llama", head_dim=24)
    with pytest.raises(UserError, match="this cache cannot be float16") as caught:
        compile_model(
            Request(
                tmp_path / "llama",
                ("x86",),
                tmp_path / "out",
                quant="a16w8",
                group_size=32,
                plugin=cpu_library,
                kv_cache_type="float16",
            )
        )
    assert "a head has 24 channels, expected a multiple of 16" in caught.value.found
    assert not (tmp_path / "out").exists()
    for given in ({}, {"plugin": cpu_library, "portable": True}):
        with pytest.raises(UserError, match="no float16 cache on a CPU") as stock:
            compile_model(Request(TINY, ("x86",), tmp_path / "out", kv_cache_type="float16", **given))
        assert "--plugin auto without --portable" in stock.value.fix
