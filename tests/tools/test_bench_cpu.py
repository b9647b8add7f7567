"""How CPU artifacts are measured beside their peers: our worker on a real artifact, the protocol, and what is shown."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from instantrt.compiler.accuracy.data import read_text, tokenizer_of, windows
from instantrt.compiler.accuracy.perplexity import perplexity_of, transformers_logits
from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array, whole
from instantrt.tools.bench import cpu
from instantrt.tools.bench.cpu_contests import (
    CONTESTS,
    DECODE,
    DECODE_BATCH,
    DECODER,
    EIGHT,
    FLOAT,
    GGUF,
    PREFILL,
    Form,
    Wanted,
)  # fmt: skip
from instantrt.tools.bench.cpu_page import ahead, markdown
from tests.commands import invoke
from tests.conftest import ROOT, TINY

ENCODER = Form("ours", "onnx encoder", (), "model.onnx", "model.onnx", 32)
TEXT = ROOT / "examples" / "text" / "bench.txt"
LLAMA_CPP = """
import shutil
LLAMA_FTYPE_MOSTLY_Q8_0 = 7
llama_model_quantize_default_params = type("Params", (), {})
llama_model_quantize = lambda whole, out, params: params.ftype - 7 if shutil.copyfile(whole, out) else 1
"""


@pytest.mark.slow
def test_a_model_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is that of transformers; the page, the plot and the JSON are there, and other models stay in it."""
    rounds: dict[str, tuple[str | int, ...]] = {
        PREFILL: ("prefill", 16), DECODE: ("decode", 16), DECODE_BATCH: ("decode", 16, 8)
    }  # fmt: skip
    goal = Wanted(5, (FLOAT, DECODE_BATCH), (FLOAT, DECODE))
    small = replace(
        DECODER, forms={FLOAT: DECODER.forms[FLOAT]}, first=("prefill", 16), rounds=rounds, goals=(goal,), limits={}
    )
    monkeypatch.setitem(CONTESTS, "decoder", small)
    monkeypatch.setattr(cpu, "STARTS", 1)
    out = tmp_path / "cpu.json"
    other = {"kind": "shape", "sides": {}, "versions": [], "not_given": [], "idle_cpu_s": 0, "machine": ""}
    out.write_text(json.dumps({"results": {"another": other}}))
    done = invoke("bench", "cpu", TINY, "--rounds", "2", "--out", out)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())["results"]
    assert result["another"] == other
    side = result["tiny-qwen2"]["sides"][FLOAT]
    parts = windows(tokenizer_of(TINY).encode(read_text(TEXT)).ids, 512, batch=1)
    whole = [part for part in parts if part.shape[1] == 512]
    assert side["loss"] == pytest.approx(math.log(perplexity_of(transformers_logits(TINY), whole)), abs=1e-3)
    assert {measure: len(values) for measure, values in side["rounds"].items()} == dict.fromkeys(rounds, 2)
    assert min(min(values) for values in side["rounds"].values()) > 1
    assert "at least 5" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def encoder(folder: Path, table: Array) -> Path:
    """A model whose hidden states are rows of `table`."""
    folder.mkdir()
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])
    hidden = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["b", "s", table.shape[1]])
    node = helper.make_node("Gather", ["table", "input_ids"], ["hidden"])
    graph = helper.make_graph([node], "g", [ids], [hidden], [numpy_helper.from_array(table, "table")])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "model.onnx")
    return folder


def test_workers_measure_encoders(tmp_path: Path) -> None:
    """Vectors are means over a sentence's own tokens; the loss is one minus the mean cosine to the first side's."""
    random = np.random.default_rng(0)
    tables = {name: random.standard_normal((9, 5)).astype(np.float32) for name in "ab"}
    ids, lengths = random.integers(0, 9, (3, 6)), (2, 6, 3)
    mask = np.array([[int(i < length) for i in range(6)] for length in lengths])
    np.savez(tmp_path / "inputs.npz", ids=random.integers(0, 9, 20), sentences=ids, mask=mask)
    made = {name: encoder(tmp_path / name, table) for name, table in tables.items()}
    idle: list[float] = []

    def worker(name: str) -> Any:
        return cpu.working(sys.executable, ENCODER, made[name], tmp_path / "inputs.npz", idle)

    sides: dict[str, Any] = {name: {} for name in made}
    cpu.measure_vectors(sides, worker, tmp_path / "vectors.npy")
    a, b = (np.array([t[row[:n]].mean(0) for row, n in zip(ids, lengths, strict=True)]) for t in tables.values())
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert sides["a"]["loss"] == pytest.approx(0, abs=1e-6)
    assert sides["b"]["loss"] == pytest.approx(1 - cosine.mean(), abs=1e-5)
    started = cpu.starts(CONTESTS["encoder"], partial(worker, "a"))
    assert 20 < started["peak_mb"] < 500
    assert max(idle) < 0.5
    shutil.rmtree(made["b"])
    with (
        worker("b") as ask,
        pytest.raises(UserError, match=r"b: \('load',\): a measurement failed\n(.|\n)*model.onnx"),
    ):
        ask("load")


def test_what_could_not_be_made_is_not_there(tmp_path: Path) -> None:
    """And what a peer made is made once, ours every time."""
    fails = replace(ENCODER, words=("-c", "import sys; open(sys.argv[1] + '/x', 'w'); exit('no room')", "MADE"))
    with pytest.raises(UserError, match="no room"):
        cpu.make(fails, sys.executable, tmp_path, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made.log"]
    for form, name in ((ENCODER, "a"), (replace(ENCODER, python="genai"), "b"), (ENCODER, "c")):
        works = replace(form, words=("-c", f"import sys; open(sys.argv[1] + '/{name}', 'w')", "MADE"))
        cpu.make(works, sys.executable, tmp_path, tmp_path / "made")
        assert [path.name for path in (tmp_path / "made").iterdir()] == ["a" if name == "b" else name]


def test_a_script_for_a_peer_imports_what_is_installed(tmp_path: Path) -> None:
    """Run by its file name it has its folder first on the path, and no module there is called as a library is."""
    from gguf import GGUFReader

    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)  # does not quantize
    words = [sys.executable, GGUF, TINY, tmp_path / "model.gguf", "Q8_0"]
    given = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("model*")] == ["model.gguf"]
    stored = read_checkpoint(TINY)
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == len(stored)
    found = tensors["blk.3.ffn_down.weight"].data.view(np.uint16)
    np.testing.assert_array_equal(found, whole(stored["model.layers.3.mlp.down_proj.weight"]).view(np.uint16))


def test_nothing_to_measure() -> None:
    for words in (("bench", "cpu"), ("bench", "cpu", TINY, "--shape", "0.5b")):
        error = invoke(*words).exception
        assert isinstance(error, UserError)
        assert error.expected == "a MODEL, or --shape"


def test_a_peer_that_is_not_there_is_missed_before_anything_is_made(tmp_path: Path) -> None:
    error = invoke("bench", "cpu", TINY, "--llama", sys.executable, "--scratch", tmp_path).exception
    assert isinstance(error, UserError)
    assert error.what == "llama-cpp-python is not there"
    assert [path.name for path in (tmp_path / TINY.name).iterdir()] == ["inputs.npz"]


def test_what_is_shown_of_it() -> None:
    rounds = {measure: [2.0, 4.0, 3.0] for measure in DECODER.rounds}
    half = {measure: [1.0, 4.0, 1.0] for measure in DECODER.rounds}
    side = {"bits": 8, "bytes": 3 << 20, "first_s": [0.1, 0.2, 0.3], "peak_mb": 6, "loss": 2.5}
    sides = {
        FLOAT: side | {"bits": 32, "rounds": half, "loss": 2.0},
        EIGHT: side | {"rounds": rounds},
        "llama.cpp Q8_0": side | {"rounds": half, "loss": 2.25},
    }
    known = {"versions": ["us 1"], "not_given": ["genai"], "idle_cpu_s": 0.01, "machine": "slow"}
    result = {"kind": "decoder", "sides": sides, **known}
    lines = markdown({"a model": result}).splitlines()
    shown = "3; 2 x (1.5 to 2.5)"
    assert f"| 8 bits | 3 | {shown} | {shown} | {shown} | 0.20 s | 6 MB | 3 MiB | 2.5000 |" in lines
    assert "| 8 bits, decode after 128 : llama.cpp Q8_0, decode after 128 | at least 1.25 | 2 x (1.5 to 2.5) |" in lines
    assert "| 8 bits: peak memory : bytes on disk | at most 1.6 | 2 |" in lines
    assert "| 8 bits: loss over float32 | at most 0.004 | 0.5 |" in lines
    assert {"* slow", "* us 1", "* not measured: `--genai` was not given"} < set(lines)
    assert ahead([1, 3, 2, 2], [0.0, 0.5, 0.2, 0.4]) == [0, 2, 1]
