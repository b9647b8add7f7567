"""The tool on an artifact of which one scale was changed on disk: the layer is named, and the step that did it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer

from instantrt.compiler.accuracy.subjects import changed_files, request_of
from instantrt.compiler.artifact.manifest import read_manifest
from instantrt.passes.core.errors import UserError
from instantrt.tools.cli import diff as accuracy_diff
from tests.conftest import TINY

pytestmark = pytest.mark.slow

LAYER, JOINED = "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.(gate_proj+up_proj)"
PROMPT = "Once upon a time there was a small house in the middle of a large forest"


def run(out: Path, **given: Any) -> int:
    nothing = {"target": None, "text": None, "prompt": [PROMPT], "tokens": None, "forms": "", "max_kl": None}
    options = {**nothing, "max_ppl_increase": None, "report": None, "find": False, **given}
    with pytest.raises(typer.Exit) as done:
        accuracy_diff.main(out=out, model=TINY, **options)
    return int(done.value.exit_code)


def break_scale(file: Path) -> None:
    """The scales of one row of one layer, 1 % too large, in the artifact's own bytes."""
    model = onnx.load(file, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == f"{JOINED}.scales")
    offset = int(next(e.value for e in tensor.external_data if e.key == "offset"))
    data = np.memmap(file.with_name(f"{file.name}.data"), np.float32, "r+", offset, tuple(tensor.dims))
    data[3] *= np.float32(1.01)
    data.flush()


def test_a_changed_scale_is_found_and_located(
    tiny_compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_compiled, out)
    break_scale(out / "x86" / "model.onnx")
    assert run(out, max_kl=1e-9) == 1
    shown = capsys.readouterr().out
    assert shown.strip().splitlines()[-1] == "FAILED"
    assert f"{LAYER}: lowering error" in shown
    body = json.loads((out / "report" / "x86" / "report.json").read_text())
    assert {row["layer"] for row in body["layers"] if row["findings"]} == {LAYER}
    assert any(v.startswith("KL ") for v in body["violations"])
    assert run(out, find=True) == 1
    shown = capsys.readouterr().out
    assert "after pass writing the artifact" in shown
    assert LAYER in shown or JOINED in shown
    assert shown.strip().splitlines()[-1] == "FAILED"


def test_an_untouched_artifact_passes(tiny_compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_compiled, report=tmp_path, forms="float,twin,artifact") == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == "PASSED"
    assert (tmp_path / "x86" / "report.html").is_file()
    assert not (tiny_compiled / "report").exists()


def test_files_that_the_artifact_was_not_made_of_are_named(tiny_compiled: Path, tmp_path: Path) -> None:
    """A failed comparison with another checkpoint of the same shape says so."""
    artifacts = read_manifest(tiny_compiled)
    assert {"config.json", "model.safetensors"} <= set(artifacts[0].source["files"])
    files = [TINY / name for name in artifacts[0].source["files"]]
    assert changed_files(artifacts, files) == []
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"another")
    assert changed_files(artifacts, [file for file in files if file.name != other.name]) == [other.name]
    assert changed_files(artifacts, [other, *(file for file in files if file.name != other.name)]) == [other.name]


def test_a_target_that_was_not_compiled_is_refused(tiny_compiled: Path) -> None:
    with pytest.raises(UserError, match="no artifact for target sm90"):
        request_of(tiny_compiled, TINY, "sm90")
