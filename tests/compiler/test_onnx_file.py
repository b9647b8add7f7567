"""ONNX files as input: an encoder, our own LLM export, inline and external weights, and hostile external data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import BertConfig, BertModel

from compiler.build import compile_model
from compiler.frontend import load
from compiler.request import Request
from compiler.triton.integrity import sha256
from passes.errors import UserError
from tests.conftest import TINY, planned_and_written
from tests.graphs import relative

FEEDS = {"input_ids": np.array([[5, 7, 9, 11]]), "attention_mask": np.ones((1, 4), np.int64)}


@pytest.fixture(scope="module", params=["inline", "external"])
def bert(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as torch exports it, opset 18, at which block-wise quantization does not exist."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    torch.manual_seed(0)
    config = BertConfig(**sizes, vocab_size=99, attn_implementation="eager")
    model = BertModel(config, add_pooling_layer=False).eval()
    folder = tmp_path_factory.mktemp("bert")
    inputs = tuple(torch.from_numpy(v) for v in FEEDS.values())
    program = torch.onnx.export(
        model, inputs, input_names=list(FEEDS), output_names=["hidden"], opset_version=18, dynamo=True, verbose=False
    )
    assert program is not None
    program.save(folder / "bert.onnx", external_data=request.param == "external")
    assert (folder / "bert.onnx.data").exists() == (request.param == "external")
    return folder / "bert.onnx"


def run(path: Path, feeds: dict[str, Any]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    output: np.ndarray = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    return output


@pytest.mark.parametrize(
    ("quant", "group", "bound"), [("a16w8", None, 5e-3), ("a16w4", 32, 1e-1), ("none", None, 1e-6)]
)
def test_an_encoder_compiles(bert: Path, tmp_path: Path, quant: str, group: int | None, bound: float) -> None:
    planned = planned_and_written(Request(bert, ("x86",), tmp_path, quant=quant, group_size=group))
    quantized = planned.twins["x86"].quantized
    assert len(quantized) == (0 if quant == "none" else 12)
    assert relative(run(tmp_path / "x86/model.onnx", FEEDS), run(bert, FEEDS)) < bound
    files = json.loads((tmp_path / "manifest.json").read_text())["artifacts"][0]["source"]["files"]
    assert files == {path.name: sha256(path) for path in bert.parent.iterdir()}


def test_our_own_float_export_compiles_again(tmp_path: Path) -> None:
    """Hugging Face -> float ONNX -> quantized ONNX gives the same weights as the direct road."""
    compile_model(Request(TINY, ("x86",), tmp_path / "float", quant="none", portable=True))
    exported = load(tmp_path / "float/x86/model.onnx")
    assert exported.llm is not None
    assert (exported.llm.layers, exported.llm.kv_heads, exported.llm.vocab) == (4, 2, 4096)
    twice = Request(tmp_path / "float/x86/model.onnx", ("x86",), tmp_path / "twice", quant="a16w8")
    planned = planned_and_written(twice)
    direct = planned_and_written(Request(TINY, ("x86",), tmp_path / "direct", quant="a16w8"))
    kinds = [{path: str(d) for path, d in p.twins["x86"].decisions.items()} for p in (planned, direct)]
    assert kinds[0] == kinds[1]
    codes = [initializers(tmp_path / f"{name}/x86/model.onnx", r"codes_s8$") for name in ("twice", "direct")]
    assert len(codes[0]) == 28
    assert all((codes[0][name] == values).all() for name, values in codes[1].items())


def initializers(path: Path, pattern: str) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if re.search(pattern, t.name)}


def external(tmp_path: Path, **entries: str) -> Path:
    """A model with one external weight [4, 64], whose reference is overridden by `entries`."""
    x, y = (onnx.helper.make_tensor_value_info(n, 1, ["b", d]) for n, d in (("x", 4), ("y", 64)))
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4, 64], data_location=onnx.TensorProto.EXTERNAL)
    info = {"location": "w.data", "offset": "0", "length": "1024", **entries}
    weight.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in info.items())
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="/fc/MatMul")
    graph = onnx.helper.make_graph([node], "g", [x], [y], [weight])
    (tmp_path / "w.data").write_bytes(np.ones((4, 64), np.float32).tobytes())
    (tmp_path / "m.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return tmp_path / "m.onnx"


def test_external_data_is_found(tmp_path: Path) -> None:
    assert load(external(tmp_path)).graph.tensors()["w"].shape == (4, 64)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"location": "../w.data"}, "outside the model's folder"),
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "nothing.data"}, "external data is missing"),
        ({"location": ""}, "external data is missing"),
        ({"offset": "-4"}, "does not fit"),
        ({"offset": "8"}, "does not fit"),
        ({"offset": "x"}, "no number"),
        ({"length": "4096"}, "does not fit"),
        ({"length": str(1 << 70)}, "does not fit"),
    ],
)
def test_hostile_external_data_is_refused(tmp_path: Path, entries: dict[str, str], says: str) -> None:
    path = external(tmp_path, **entries)
    with pytest.raises(UserError, match=says):
        load(path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    path = external(inside)
    (tmp_path / "secret").write_bytes((inside / "w.data").read_bytes())
    (inside / "w.data").unlink()
    (inside / "w.data").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="outside the model's folder"):
        load(path)


@pytest.mark.parametrize("data", [b"", b"\x08", b"not protobuf at all", b"\xff" * 64])
def test_files_that_are_no_onnx_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(UserError):
        load(tmp_path / "m.onnx")


def test_paths_that_are_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"x")
    for path in (tmp_path / "m.bin", tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError):
            load(path)


def unranked(folder: Path, op: str, domain: str = "") -> Path:
    """x [b, 64] -> `op` with a constant -> y, of which the file says nothing but its type."""
    weight = onnx.numpy_helper.from_array(np.ones((64, 32), np.float32), "w")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", 64])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    node = onnx.helper.make_node(op, ["x", "w"], ["y"], name="fc", domain=domain)
    graph = onnx.helper.make_graph([node], "g", [x], [y], [weight])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("custom", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "m.onnx")
    return folder / "m.onnx"


def test_the_rank_of_an_output_is_inferred(tmp_path: Path) -> None:
    assert list(load(unranked(tmp_path, "MatMul")).graph.outputs[0].shape) == ["b", 32]


def test_an_output_of_unknown_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the rank of an output is not known[^$]*found:\s+y"):
        load(unranked(tmp_path, "Mystery", "custom"))
