"""The inspection says what a checkpoint is, and finds what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantrt.compiler.inspect import inspect
from instantrt.compiler.plan import plan
from instantrt.compiler.request import Request
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array
from tests.checkpoints import DOWN_PROJ, NAMES, Q_PROJ, TINY, whole_checkpoint
from tests.commands import invoke

FORMATS = {
    "awq-int4-g128": ("awq, 4 bits, groups of 128", "AWQ-INT4 (A16W4)"),
    "ct-w4a16-g128-asym": ("compressed-tensors, 4 bits, groups of 128", "CT-INT4 (A16W4)"),
    "ct-w8a16": ("compressed-tensors, 8 bits, groups of 128", "CT-INT8 (A16W8)"),
    "ct-w8a8-static": ("compressed-tensors, 8 bits, per channel", "CT-INT8 (A8W8)"),
    "ct-w8a8-dyn": ("compressed-tensors, 8 bits, per channel", "CT-INT8 (A8W8)"),
    "gptq-int4-g128-asym-v2": ("gptq, 4 bits, groups of 128", "GPTQ-INT4 (A16W4)"),
    "gptq-int4-g128-desc_act": ("gptq, 4 bits, groups of 128, activation order", "GPTQ-INT4 (A16W4)"),
    "gptq-int4-g128-sym": ("gptq, 4 bits, groups of 128", "GPTQ-INT4 (A16W4)"),
    "gptq-int4-g32-asym": ("gptq, 4 bits, groups of 32", "GPTQ-INT4 (A16W4)"),
    "gptq-int8-perchannel": ("gptq, 8 bits, per channel", "GPTQ-INT8 (A8W8)"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_checkpoint_has_no_problems(name: str, tmp_path: Path) -> None:
    found = inspect(whole_checkpoint(name, tmp_path))
    assert (found.format, found.runs_as) == FORMATS[name]
    assert found.problems == ()
    harmless = sum(entry.count for entry in found.account.harmless)
    assert harmless == (7 if name == "ct-w8a8-static" else 0)
    assert found.account.parameters + found.account.quantization + harmless == found.tensors
    assert sum(layer.scales is not None for layer in found.layers) == 7
    assert found.parameters > 2_000_000


def test_seconds_of_importing_torch_are_not_called_reading(tmp_path: Path) -> None:
    for expected in (["importing torch and transformers"], []):  # the second time nothing is asked of it
        said: list[str] = []
        inspect(TINY, cache=tmp_path, say=said.append)
        assert said == expected


def test_a_float_checkpoint() -> None:
    found = inspect(TINY)
    for quant in ("a16w8", "a8w8"):
        size = plan(Request(TINY, ("x86",), Path("out"), quant=quant)).size("x86")
        assert abs(found.bytes_as[quant]["onnxruntime"] / size - 1) < 0.02
    assert found.bytes_as["a16w4"]["tensorrt"] < found.bytes_as["a16w8"]["tensorrt"] < found.bytes_on["tensorrt"]
    assert (found.format, found.problems) == ("float", ())
    assert "IQ-INT8 (A16W8): run" in found.targets["x86"]
    numbers = 2 * 4 * 2 * 64  # keys and values, layers, heads, sizes
    assert found.cache_bytes_per_token == {"onnxruntime": 4 * numbers, "tensorrt": 2 * numbers}


Change = Callable[[dict[str, Any], dict[str, Array]], None]


def replaced(name: str, make: Callable[[Array], Array]) -> Change:
    return lambda config, tensors: tensors.update({name: make(tensors[name])})


def poisoned(value: float) -> Callable[[Array], Array]:
    def poison(scales: Array) -> Array:
        scales = scales.copy()
        scales[0, 3] = value
        return scales

    return poison


def announce(**changes: Any) -> Change:
    return lambda config, tensors: config["quantization_config"].update(changes)


def lose(name: str) -> Change:
    return lambda config, tensors: tensors.__delitem__(name)


CHANGES: dict[str, tuple[Change, str, str]] = {
    "scale zero": (replaced(f"{Q_PROJ}.scales", poisoned(0)), "positive finite", f"{Q_PROJ}.scales[0, 3]"),
    "scale NaN": (replaced(f"{Q_PROJ}.scales", poisoned(np.nan)), "positive finite", f"{Q_PROJ}.scales[0, 3]"),
    "scale infinite": (replaced(f"{Q_PROJ}.scales", poisoned(np.inf)), "positive finite", f"{Q_PROJ}.scales[0, 3]"),
    "zeros off centre": (
        announce(checkpoint_format="gptq_v2", format="gptq_v2"),
        "differ from the centre",
        f"{Q_PROJ}.qzeros",
    ),
    "bad groups": (replaced(f"{DOWN_PROJ}.g_idx", np.zeros_like), "equal groups", f"{DOWN_PROJ}.g_idx"),
    "order denied": (announce(desc_act=False), "another order", f"{Q_PROJ}.g_idx"),
    "other bits": (announce(bits=8), "disagrees", f"{Q_PROJ}.qweight"),
    "three bits": (announce(bits=3), "GPTQ bits", ""),
    "lost norm": (lose("model.norm.weight"), "has no tensor", "model.norm.weight"),
    "lost scales": (lose(f"{Q_PROJ}.scales"), "no scales", Q_PROJ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_wrong_is_found(name: str, tmp_path: Path) -> None:
    change, words, where = CHANGES[name]
    folder = whole_checkpoint("gptq-int4-g128-desc_act", tmp_path, change)
    problems = inspect(folder).problems
    assert any(words in p.what and where in p.where for p in problems), problems


def test_tensors_without_a_place_and_lost_biases(tmp_path: Path) -> None:
    def change(_config: dict[str, Any], tensors: dict[str, Array]) -> None:
        tensors["model.layers.7.strange"] = np.zeros(4, np.float32)
        tensors[f"{DOWN_PROJ}.bias"] = np.ones(256, np.float16)

    found = inspect(whole_checkpoint("gptq-int4-g128-sym", tmp_path, change))
    bias, strange = found.problems
    assert (bias.where, "does not announce" in bias.what) == (f"{DOWN_PROJ}.bias", True)
    assert "model.layers.7.strange" in strange.what
    assert strange.found == "layer 7, and the config announces 1"


def test_the_command_line(tmp_path: Path) -> None:
    whole_checkpoint("gptq-int4-g128-sym", tmp_path / "sound")
    sound = invoke("inspect", tmp_path / "sound", "--json")
    assert sound.exit_code == 0
    assert json.loads(sound.output)["format"] == "gptq, 4 bits, groups of 128"
    whole_checkpoint("gptq-int4-g128-sym", tmp_path / "broken", announce(checkpoint_format="gptq_v2", format="gptq_v2"))
    broken = invoke("inspect", tmp_path / "broken")
    assert broken.exit_code == 1
    assert "7 problems" in broken.output
    assert "differ from the centre" in broken.output


def test_of_what_cannot_be_opened_nothing_else_is_said(tmp_path: Path) -> None:
    """No counts of what was not read."""
    whole_checkpoint("gptq-int4-g128-sym", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    lines = invoke("inspect", tmp_path).output.splitlines()
    shown = [line for line in lines if not line.startswith(("reading ", " "))]
    assert [line.partition(":")[0] for line in shown] == [tmp_path.name, "problem", "1 problem"]


def test_layers_alike_and_targets_alike_share_a_row() -> None:
    shown = invoke("inspect", TINY).output
    assert len(shown.splitlines()) < 70
    assert "model.layers.{0-3}.mlp.down_proj" in shown
    assert "model.layers.3.mlp.down_proj" not in shown
    assert "sm80, sm86, sm89, sm120," in shown
    assert max(map(len, shown.partition("onnxruntime: ")[0].splitlines())) <= 80
    assert "model.layers.3.mlp.down_proj" in invoke("inspect", TINY, "--every-layer").output


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes a checkpoint's folder"):
        inspect(tmp_path / "nothing")
