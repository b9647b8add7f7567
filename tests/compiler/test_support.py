"""The support table: docs/support.md shows what the data says, and a refused pair is refused before any work."""

from __future__ import annotations

from itertools import product

import pytest

from instantrt.compiler.quant.config import COMPUTE, QuantConfig
from instantrt.compiler.support import METHODS, Shown, cell, check_supported, markdown, method_of
from instantrt.compiler.target import TARGETS, Backend, find_target
from instantrt.passes.core.errors import UserError
from tests.conftest import ROOT

# The spec's rows; ours may offer more.
SPEC = (
    "IQ-INT8 (A16W8)",
    "IQ-INT4 (A16W4)",
    "IQ-INT8 (A8W8)",
    "GPTQ-INT8 (A16W8)",
    "GPTQ-INT8 (A8W8)",
    "GPTQ-INT4 (A16W4)",
)


def test_the_documentation_shows_the_table() -> None:
    assert markdown() in (ROOT / "docs/support.md").read_text("utf-8"), (
        "python -m instantrt.compiler.support prints the table"
    )


def test_every_row_of_the_spec_is_there() -> None:
    assert [m.name for m in METHODS][: len(SPEC)] == list(SPEC)


def test_cpus_run_every_row() -> None:
    for method in METHODS:
        assert cell(method, find_target("x86")).shown is Shown.RUN
        assert cell(method, find_target("armv9")).shown in (Shown.RUN, Shown.COMPILED)


def test_what_is_refused_says_why_and_where_it_runs() -> None:
    refused = [(m, t) for m in METHODS for t in TARGETS if cell(m, t).shown is Shown.REFUSED]
    assert refused
    for method, target in refused:
        assert target.backend is Backend.TENSORRT
        compute = "activate_quant" if method.activate else "weight_only"
        config = QuantConfig(method.quant_method, method.weight_format, compute_method=compute)
        with pytest.raises(UserError) as caught:
            check_supported([target], config)
        assert caught.value.found == cell(method, target).reason
        assert "x86" in caught.value.fix


def test_the_plugin_runs_what_tensorrt_alone_cannot() -> None:
    """Every GPU with int8 tensor cores that TensorRT still knows; the table says so in a note of the refused cell."""
    a8w4 = QuantConfig("gptq", "uint4", compute_method="activate_quant")
    for target in (t for t in TARGETS if t.backend is Backend.TENSORRT):
        with pytest.raises(UserError) as refused:
            check_supported([target], a8w4)
        assert refused.value.fix.startswith("--plugin FILE, or ") == (target.sm != 70)
        if target.sm != 70:
            check_supported([target], a8w4, plugin=True)
            shown = cell(method_of(a8w4), target, plugin=True)
            assert shown.shown is (Shown.BUILT if target.rtx else Shown.COMPILED)
            assert f"no int8 by int4 product without `--plugin`; with it: {shown}" in markdown()
    with pytest.raises(UserError, match="no int8 tensor cores"):
        check_supported([find_target("sm70")], a8w4, plugin=True)


def test_what_has_no_row_is_refused() -> None:
    """Of a method, weights and activations that a config may say: a row of the table, or an error that names them."""
    rows = {(m.quant_method, m.weight_format, m.activate) for m in METHODS}
    for method, weights, compute in product({m.quant_method for m in METHODS}, ("int8", "uint4"), COMPUTE):
        config = QuantConfig(quant_method=method, weight_format=weights, compute_method=compute)
        if (method, weights, config.activate_quant) in rows:
            assert method_of(config) in METHODS
        else:
            with pytest.raises(UserError, match=f"{method} has no such weights and activations"):
                method_of(config)
