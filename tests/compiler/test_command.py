"""The command line: what it offers, what it refuses to be told in vain, what it says on the way."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import onnx_graphsurgeon as gs
import pytest
from typer.testing import CliRunner

from instantrt.compiler import build
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.backend.tensorrt.choose import Builder
from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.quant.config import Quant
from instantrt.compiler.quant.resolve import resolve
from instantrt.compiler.request import WITHOUT, KvCache, Logits, Request, check_options
from instantrt.passes.core.errors import UserError
from instantrt.tools.cli.app import app
from tests.checkpoints import HERE, config_of
from tests.compiler.accuracy_models import float_graph
from tests.conftest import TINY

UNSAID = {"enable_quant", "layers"}  # in JSON alone


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two linears in an .onnx file."""
    write_model(float_graph(), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


def refused(*arguments: str | Path) -> UserError:
    error = CliRunner().invoke(app, list(map(str, arguments))).exception
    assert isinstance(error, UserError), error
    return error


def test_every_field_of_a_request_is_an_option_and_help_shows_its_values() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80", "TERM": "dumb"}).output
    assert max(map(len, shown.splitlines())) <= 80
    given = {f.name for f in fields(Request)} - UNSAID - {"model", "targets"}
    assert [name for name in given if f"--{name.replace('_', '-')} " not in shown] == []
    words = " ".join(shown.replace("│", " ").split())
    for value in (v for choices in (Quant, Builder, Logits, KvCache) for v in get_args(choices)):
        assert value in words
    for panel in ("Quantization", "CPU artifacts", "Engines", "Accuracy", "Looking, not compiling"):
        assert f"─ {panel} ─" in shown


def test_options_reach_the_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Request] = []
    monkeypatch.setattr("instantrt.tools.cli.app.compile_request", lambda request, *a, **k: made.append(request))
    config = tmp_path / "q.json"
    config.write_text(json.dumps({"weight_only_quant": True, "customized_quant_config": {"weight_format": "int8"}}))
    arguments = ["m", "--target", "x86", "--target", "sm89", "--quant-config", config, "--ignore", "a", "-o", "o"]
    more = ["--kv-cache", "in-place", "--max-batch", "4", "--portable", "--plugin-rounding", "--plugin", config]
    done = CliRunner().invoke(app, list(map(str, [*arguments, *more])))
    assert done.exit_code == 0, done.output
    assert made == [
        Request(
            model=Path("m"),
            targets=("x86", "sm89"),
            out=Path("o"),
            quant_config={"weight_format": "int8"},
            weight_only=True,
            ignore=("a",),
            kv_cache="in-place",
            max_batch=4,
            portable=True,
            plugin_rounding=True,
            plugin=config,
        )
    ]


def test_a_value_that_does_not_exist_is_refused_by_the_list_of_those_that_do() -> None:
    done = CliRunner().invoke(app, [str(TINY), "--target", "x86", "--quant", "a16w9"])
    assert done.exit_code == 2
    assert "'a16w9' is not one of 'a16w8'" in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((TINY, "--target", "x86", "--json"), "--json does nothing by itself"),
        ((TINY, "--target", "x86", "--text", "t.txt"), "--text does nothing by itself"),
        (("--check", "build", "--target", "x86"), "--check has no use for --target"),
        (("--inspect", TINY, "--quant", "a16w8", "--verify"), "--inspect has no use for --quant and --verify"),
        (("--list-targets", TINY), "--list-targets has no use for model"),
    ],
)
def test_an_option_that_does_nothing_beside_the_others_is_refused(arguments: tuple[Any, ...], says: str) -> None:
    assert refused(*arguments).what == says


OTHER: dict[str, Any] = {"cpu_preset": "fast", "builder": "kit", "logits": "all", "kv_cache": "in-place"}
OTHER |= {"plugin": Path(__file__), "timing_cache": Path("t"), "hardware_compatible": "ampere_plus"}
OTHER |= {"max_batch": 2, "max_length": 600, "opt_length": 4, "memory_limit": 9, "optimization_level": 2}


@pytest.mark.parametrize(("lacking", "target"), [("a CPU target", "sm89"), ("a GPU target", "x86")])
def test_an_option_that_no_target_has_use_for_is_refused(lacking: str, target: str, tmp_path: Path) -> None:
    for name in WITHOUT[lacking]:
        needed = {"plugin": Path(__file__)} if name == "plugin_rounding" else {}
        given = {**needed, name: OTHER.get(name, True)}
        with pytest.raises(UserError, match=f"{next(iter(given))} does nothing without {lacking}"):
            build.compile_model(Request(TINY, (target,), tmp_path, **given))
        check_options(Request(TINY, ("sm89", "x86"), tmp_path, **given))


def model_of(folder: Path) -> FloatModel:
    """A checkpoint without its graph: enough to resolve a request."""
    return FloatModel(gs.Graph(), folder, config_of(folder), read_checkpoint(folder), None)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"group_size": 32}, "group_size"),
        ({"weight_only": True}, "weight_only"),
        ({"ignore": ("nothing.*",)}, "ignore"),
        ({"lm_head": "int8"}, "lm_head"),
        ({"max_kl": 0.1}, "max_kl"),
        ({"quant": "none", "ignore": ("*",)}, "ignore"),
    ],
)
def test_what_only_quantization_has_use_for_is_refused_without(given: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=f"^{TINY}: {name} does nothing without quantization"):
        resolve(Request(TINY, ("x86",), Path("o"), **given), model_of(TINY))
    if "quant" not in given:
        resolve(Request(TINY, ("x86",), Path("o"), **{"quant": "a16w8", **given}), model_of(TINY))


def test_a_quantized_checkpoint_has_decided_about_its_head() -> None:
    model = model_of(HERE / "gptq-int4-g128-sym")
    with pytest.raises(UserError, match="lm_head does nothing without a float checkpoint"):
        resolve(Request(model.folder, ("x86",), Path("o"), lm_head="int8"), model)


def test_a_config_may_ignore_modules_of_a_quantized_checkpoint() -> None:
    model = model_of(HERE / "gptq-int4-g128-sym")
    custom = {"quant_method": "gptq", "ignore": ["lm_head"]}
    config, _ = resolve(Request(model.folder, ("x86",), Path("o"), ignore=("b",), quant_config=custom), model)
    assert config is not None
    assert config.ignore == ("lm_head", "b")


def test_quantization_that_is_switched_off_and_asked_for_is_refused() -> None:
    with pytest.raises(UserError, match="quantization disabled"):
        Request(TINY, ("x86",), Path("o"), quant="a16w8", enable_quant=False)


def test_a_text_that_is_not_there_is_known_before_any_work(tmp_path: Path) -> None:
    error = refused(TINY, "--target", "x86", "--verify", "--text", tmp_path / "none.txt", "-o", tmp_path / "o")
    assert error.what == "the text cannot be read"
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["o[/bold]x", "o[bold]x", "o:smile:x"])
def test_a_path_is_printed_as_it_is(name: str, small: Path) -> None:
    out = small.parent / name
    done = CliRunner().invoke(app, [str(small), "--target", "x86", "--quant", "a16w8", "--verify", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert f"{out / 'x86/model.onnx'}  " in done.output
    assert str(out / "report/x86/report.html") in done.output


def test_a_line_a_stage_where_nobody_watches(small: Path) -> None:
    done = CliRunner().invoke(app, [str(small), "--target", "x86", "--quant", "a16w8", "-o", str(small.parent / "o")])
    lines = done.output.splitlines()
    assert lines[0] == f"reading {small}"
    assert lines[1] == "deciding how to quantize"
    assert lines[2].startswith("writing 0.0 MB")
    assert lines[-1].startswith("PASSED")
    assert "" not in lines


def test_the_plan_says_how_much_memory_each_target_takes(tmp_path: Path) -> None:
    targets = ("--target", "x86", "--target", "sm89", "--target", "sm90")
    done = CliRunner().invoke(app, [str(TINY), *targets, "--quant", "a16w8", "--dry-run", "-o", str(tmp_path / "o")])
    assert "Memory for x86, sm90: below 1.5 GB" in done.output
    assert "Memory for sm89: 2 to 3 times the engine's weights" in done.output
