"""Every option is written once: what its one line says reaches the checks, trtexec, the builder and the manifest."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from instantrt.compiler.compile import check_places
from instantrt.compiler.options import CpuArtifacts, EngineOptions, LanguageModel, Quantization, options_of
from instantrt.compiler.plan import plan
from instantrt.compiler.request import DEFAULTS, UNRECORDED, Request
from instantrt.passes.core.dump import text_of
from instantrt.passes.core.errors import UserError
from tests.checkpoints import HERE, whole_checkpoint
from tests.conftest import TINY

# The order in which manifests record a request: it is part of their bytes.
RECORDED = [
    "quant", "group_size", "search", "weight_only", "enable_quant", "quant_config", "ignore", "lm_head",
    "embeddings", "cpu_preset", "portable", "trust_remote_code", "truncate_dim", "requantize", "builder",
    "max_batch", "max_length", "opt_length", "logits", "kv_cache", "kv_cache_type", "memory_limit",
    "optimization_level", "weight_streaming", "version_compatible", "hardware_compatible", "plugin_rounding",
    "plugin_batch_invariant", "max_kl", "max_ppl_increase", "max_size", "bits_per_weight", "layers",
]  # fmt: skip


def test_the_order_of_the_record() -> None:
    request = Request(Path("m"), ("x86",), Path("o"))
    assert [name for name in asdict(request) if name not in UNRECORDED] == RECORDED
    assert {f.name for f in fields(Request)} == {*RECORDED, *UNRECORDED} == set(DEFAULTS)
    assert "smoke" in UNRECORDED  # it changes no byte


def test_a_request_is_the_builders_options_too() -> None:
    request = Request(Path("m"), ("sm89",), Path("o"), memory_limit=512, weight_streaming=True, optimization_level=0)
    options = request.engine_options()
    assert options == EngineOptions(memory_limit=512, weight_streaming=True, optimization_level=0)
    assert [(o.trtexec.format(value), o.flag) for o, value in options.asked] == [
        ("--memPoolSize=workspace:512", ""),
        ("--builderOptimizationLevel=0", ""),
        ("--allowWeightStreaming", "WEIGHT_STREAMING"),
    ]
    assert EngineOptions().asked == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"optimization_level": 6}, "optimization_level is out of range\n  expected: 0 to 5\n  found:    6"),
        ({"memory_limit": 1 << 30}, "memory_limit is out of range\n  expected: MiB, 1 to 1048575"),  # these are bytes
        ({"hardware_compatible": "ampere"}, "hardware_compatible is out of range\n  expected: none or ampere_plus"),
        ({"max_kl": float("nan")}, "max_kl is out of range\n  expected: a number above 0"),
        ({"max_ppl_increase": 0}, "max_ppl_increase is out of range"),
        ({"max_size": float("inf")}, "max_size is out of range"),
        ({"kv_cache": "inplace"}, "kv_cache has no such value\n  expected: concat or in-place"),
        ({"kv_cache_type": "int4"}, "kv_cache_type has no such value\n  expected: float32 or float16 or int8 or uint4"),
        ({"cpu_preset": None}, "cpu_preset has no such value"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        Request(Path("m"), ("sm89",), Path("o"), **given)


def test_strings_become_paths_and_tuples() -> None:
    request = Request("m", "sm89", "o", ignore="a", timing_cache="t")  # type: ignore[arg-type]
    assert (request.ignore, request.timing_cache) == (("a",), Path("t"))
    assert EngineOptions(timing_cache="t").timing_cache == Path("t")  # type: ignore[arg-type]


def test_every_option_says_what_it_is() -> None:
    for f, about in options_of(Request):
        assert about.help
        assert about.help[-1] not in ".:", f.name


VALUES: dict[str, tuple[Any, ...]] = {  # one of them is no default
    "quant": ("a16w4", "a8w8"),
    "group_size": (16,),
    "search": ("activations", "none"),
    "ignore": (("*down_proj", "*output*"),),
    "lm_head": ("float", "int8"),
    "embeddings": ("stored", "int8"),
    "cpu_preset": ("exact",),
    "logits": ("all",),
    "kv_cache": ("in-place",),
    "kv_cache_type": ("int8",),
}


@pytest.mark.parametrize(
    ("model", "target", "given", "idle"),
    [
        (TINY, "x86", {}, {"cpu_preset"}),
        (TINY, "x86", {"quant": "a16w8"}, {"weight_only"}),
        (TINY, "sm89", {}, set()),
        (TINY, "sm89", {"quant": "a16w4"}, {"weight_only"}),
        (HERE / "gptq-int8-perchannel", "x86", {}, {"cpu_preset"}),
        (HERE / "gptq-int4-g128-sym", "x86", {}, {"weight_only"}),
        (HERE / "gptq-int4-g128-sym", "x86", {"quant": "a8w4"}, set()),
        ("embedding", "x86", {}, {"cpu_preset", "portable"}),
        ("embedding", "x86", {"quant": "a8w8", "search": "none"}, {"cpu_preset", "portable"}),
    ],
)
def test_no_option_does_nothing_in_silence(
    model: Path | str, target: str, given: dict[str, Any], idle: set[str], embedding: Path, tmp_path: Path
) -> None:
    """It changes the graph, is refused, or a note names it: `idle` is where it is a note."""
    folder, noted = embedding.parent / "letters" if isinstance(model, str) else model, set[str]()
    if folder.parent == HERE:
        folder = whole_checkpoint(folder.name, tmp_path / "model")

    def made_with(**more: Any) -> tuple[str, bool]:
        said: list[str] = []
        request = Request(folder, (target,), tmp_path / "o", **{**given, **more})
        check_places(request)
        planned = plan(request, said.append)
        noted.update(name for note in planned.notes for name in more if note.startswith(f"{name} does nothing"))
        return text_of(planned.lowered[target]), "measuring the inputs of each layer" in said

    before = made_with()
    for f, _ in (each for group in (Quantization, CpuArtifacts, LanguageModel) for each in options_of(group)):
        if f.name in given or f.name in ("quant_config", "calibration"):
            continue
        does = False
        for value in VALUES.get(f.name, (True,)):
            try:
                does |= made_with(**{f.name: value}) != before
            except UserError:
                does = True
        assert does == (f.name not in noted), f.name
    assert noted == idle
