"""Requests and quantization configs: what fits is taken, what does not is an error that says what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantrt.compiler.quant.config import KEYS, QuantConfig, parse_quant_config
from instantrt.compiler.request import Request, fields_from_json
from instantrt.compiler.target import TARGETS, find_target
from instantrt.passes.core.errors import UserError


def request(**fields: Any) -> Request:
    return Request(**{"model": Path("m"), "targets": ("x86",), "out": Path("o"), **fields})


def test_the_examples_of_the_spec_are_taken() -> None:
    assert parse_quant_config({"quant_method": "instant_quant", "weight_format": "int8"}, "t") == QuantConfig()
    sub = parse_quant_config({"quant_method": "instant_quant", "weight_format": "int8", "group_size": 128}, "t")
    assert (sub.bits, sub.group_size, sub.activate_quant) == (8, 128, False)
    four = parse_quant_config({"quant_method": "instant_quant", "weight_format": "uint4"}, "t")
    assert (four.bits, four.group_size) == (4, -1)
    act = {"quant_method": "instant_quant", "weight_format": "int8", "compute_method": "activate_quant"}
    assert parse_quant_config(act, "t").activate_quant


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"weight_format": "int8", "gruop_size": 32}, "unknown quantization key"),
        ({"weight_format": "int4"}, "'uint4' has the same number of levels"),
        ({"weight_format": "uint8"}, "'int8' has the same number of levels"),
        ({"weight_format": "fp8"}, "int8 or uint4"),
        ({}, "weight_format is missing"),
        ({"weight_format": "int8", "group_size": 0}, "group_size"),
        ({"weight_format": "int8", "group_size": "128"}, "group_size"),
        ({"weight_format": "int8", "group_size": True}, "group_size"),
        ({"weight_format": "int8", "quant_method": "iq"}, "instant_quant or gptq"),
        ({"weight_format": "int8", "compute_method": "fast"}, "weight_only or activate_quant"),
        ({"weight_format": "uint4", "compute_method": "activate_quant"}, "activate_quant takes int8"),
        ({"weight_format": "int8", "compute_method": "activate_quant", "group_size": 32}, "per channel only"),
        ({"weight_format": "int8", "ignore": "lm_head"}, "a list of module patterns"),
        ({"weight_format": "uint4", "zero_point": "rounded"}, "integer or float"),
        ({"weight_format": "int8", "zero_point": "float", "compute_method": "activate_quant"}, "the plain formula's"),
    ],
)
def test_what_does_not_fit_is_said(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_quant_config(raw, "config.json")
    assert says in str(caught.value)
    assert "config.json" in str(caught.value)


anything = (
    st.none() | st.booleans() | st.integers(-5, 300) | st.text(max_size=6) | st.lists(st.text(max_size=3), max_size=2)
)


@given(raw=st.dictionaries(st.sampled_from((*KEYS, "other")), anything, max_size=5))
@settings(max_examples=300, deadline=None)
def test_any_config_is_parsed_or_refused(raw: dict[str, Any]) -> None:
    try:
        config = parse_quant_config(raw, "t")
    except UserError:
        return
    assert config.bits in (4, 8)
    assert config.group_size == -1 or config.group_size > 0


def test_a_custom_config_with_quantization_disabled_is_an_error() -> None:
    with pytest.raises(UserError, match="quantization disabled"):
        request(enable_quant=False, quant_config={"quant_method": "instant_quant", "weight_format": "int8"})


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": ()},
        {"targets": ("sm999",)},
        {"quant": "w4"},
        {"quant": 7},
        {"layers": {"a": 5}},
        {"quant": "none", "group_size": 32},
        {"quant": "a16w8", "quant_config": {"weight_format": "int8"}},
        {"lm_head": "int4"},
        {"embeddings": "fp8"},
        {"cpu_preset": "turbo"},
        {"plugin_rounding": True},
        {"plugin_batch_invariant": True},
        {"plugin_rounding": True, "plugin_batch_invariant": True, "plugin": Path(__file__)},
    ],
)
def test_impossible_requests_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        request(**fields)


def test_strings_do_where_a_path_or_names_are_due() -> None:
    plain = Request("m", "x86", "o", ignore="lm_head", layers={"a": "a16w4:32"})  # type: ignore[arg-type]
    assert plain == request(ignore=("lm_head",), layers={"a": "a16w4:32"})
    assert request(targets=["x86"]).targets == ("x86",)


@pytest.mark.parametrize("form", ["a16w4:0", "a16w4", "w4:32", "a16w2:32", ""])
def test_a_format_of_a_layer_that_does_not_exist_is_refused(form: str) -> None:
    with pytest.raises(UserError, match=r"^a\.b: .*\n.*a16w4:32"):
        request(layers={"a.b": form})


def test_json_has_the_spec_names() -> None:
    custom = {"quant_method": "instant_quant", "weight_format": "int8"}
    assert fields_from_json(custom) == {"quant_config": custom}
    whole = {"enable_quant": True, "weight_only_quant": True, "customized_quant_config": custom}
    assert fields_from_json(whole) == {"enable_quant": True, "weight_only": True, "quant_config": custom}
    for broken in ({"enable_quant": 1}, {"enable_quant": True, "quant": 3}):
        with pytest.raises(UserError):
            fields_from_json(broken)


def test_targets_are_found_by_any_name() -> None:
    for target in TARGETS:
        for name in (target.name, *target.aliases, target.name.upper()):
            assert find_target(name) is target
    assert request(targets=("x86", "cpu", "armv9")).resolved_targets() == (find_target("x86"), find_target("armv9"))


def test_several_targets_in_one_word_are_said_apart() -> None:
    with pytest.raises(UserError) as caught:
        find_target("x86, sm89,other")
    assert caught.value.fix == "--target x86 --target sm89"


def test_the_public_names_are_reached_from_the_package() -> None:
    import instantrt
    from instantrt.compiler.compile import compile_model

    assert instantrt.Request is Request
    assert instantrt.compile_model is compile_model
    with pytest.raises(AttributeError):
        _ = instantrt.nothing


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", None),
        ("out", 3),
        ("max_length", "x"),
        ("max_length", 1.5),
        ("max_batch", None),
        ("max_kl", "x"),
        ("group_size", True),
        ("portable", "yes"),
        ("smoke", None),
        ("plugin", 3),
        *(("targets", value) for value in (5, None, [5], b"x86", {"x86": 1})),
        *(("layers", value) for value in ([1], "a", None)),
        ("ignore", [5]),
        ("adapter", [5]),
        ("quant_config", "q.json"),
        ("hardware_compatible", 5),
    ],
)
def test_a_value_of_another_kind_is_refused(field: str, value: object) -> None:
    given: dict[str, Any] = {"model": "m", "targets": "x86", "out": "o", field: value}
    with pytest.raises(UserError, match=f"{field} has a value of another kind"):
        Request(**given)
