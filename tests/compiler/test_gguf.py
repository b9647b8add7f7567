"""GGUF files: every type bit for bit, and the road from a file to an artifact that is the model of its weights."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from instantrt.compiler.accuracy.perplexity import artifact_logits
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.compile import compile_model
from instantrt.compiler.decide import check_tables, resolve
from instantrt.compiler.early import check_early
from instantrt.compiler.fit import check_text
from instantrt.compiler.frontend import load
from instantrt.compiler.frontend.gguf import gguf_at, refuse_gguf
from instantrt.compiler.frontend.gguf.file import open_gguf
from instantrt.compiler.inspect import inspect
from instantrt.compiler.plan import plan
from instantrt.compiler.quant.gguf import KINDS, GgufRows, GgufTensor, detect
from instantrt.compiler.request import Request
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FLOAT32, Array, View, whole
from instantrt.passes.core.quant import Codes, dequantize
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.ort.in_half import KeepScalesInHalf
from instantrt.passes.ort.tables import QuantizeTables
from tests.checkpoints import HERE
from tests.gguf_files import KINDS_OF_LAYERS, SIZES, blocks, llama

SHAPE = (96, 512)


def stored(path: Path, kind: str, raw: Array, **more: Any) -> GgufTensor:
    path.write_bytes(b"junk" + raw.tobytes())
    block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return GgufTensor(path, 4, SHAPE, FLOAT32, "t", kind, block, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_weights_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """As codes, as the floats of a tensor, and in the table of an artifact; with heads put back row by row."""
    raw = blocks(kind, SHAPE, np.random.default_rng(1))
    tensor, want = stored(tmp_path / "t", kind, raw), gguf.dequantize(raw, GGMLQuantizationType[kind])
    form = KINDS[kind]
    codes = [Codes(*tile.parts) for tile in GgufRows(tensor).tiles()]
    assert all((c.scale > 0).all() and c.codes.max() < 1 << form.bits for c in codes)
    np.testing.assert_array_equal(np.concatenate([dequantize(c, form.group_size) for c in codes]), want)
    exact = [c.scale.astype(form.exact) == c.scale for c in codes]
    assert all(e.all() for e in exact)
    turned = want.reshape(4, -1, 2, SHAPE[1]).swapaxes(1, 2).reshape(SHAPE)
    np.testing.assert_array_equal(whole(replace(tensor, heads=4)), turned)
    np.testing.assert_array_equal(rows_of_table(tensor, tmp_path), want)


def rows_of_table(tensor: GgufTensor, folder: Path) -> Array:
    """Every row of the table in ONNX Runtime, in two dimensions of ids."""
    graph, log = graph_of_table(tensor), PassLog()
    run(graph, (QuantizeTables(floats=False), KeepScalesInHalf()), log)
    assert any(node.op == "GatherBlockQuantized" for node in graph.nodes)
    write_model(graph, folder / "table.onnx")
    rows = ort.InferenceSession(folder / "table.onnx").run(None, {"input_ids": np.arange(SHAPE[0]).reshape(2, -1)})[0]
    return np.asarray(rows).reshape(SHAPE)


def graph_of_table(tensor: GgufTensor) -> gs.Graph:
    ids, out = gs.Variable("input_ids", np.int64, ("b", "s")), gs.Variable("y", np.float32, ("b", "s", SHAPE[1]))
    table = gs.Constant("t", View(tensor, SHAPE, np.float32))
    return gs.Graph([gs.Node("Gather", "g", {"axis": 0}, [table, ids], [out])], inputs=[ids], outputs=[out], opset=23)


def test_a_table_of_four_bits_is_not_asked_to_have_eight(tmp_path: Path) -> None:
    request = Request(tmp_path / "m.gguf", ("x86",), tmp_path, embeddings="int8")
    for kind in ("Q8_0", "Q4_0"):
        graph = graph_of_table(stored(tmp_path / kind, kind, blocks(kind, SHAPE, np.random.default_rng(1))))
        with nullcontext() if kind == "Q8_0" else pytest.raises(UserError, match=r"(?s)in codes of its own.*4 bits"):
            check_tables(request, graph)


@pytest.mark.parametrize(
    ("kind", "at", "value"), [("Q8_0", 0, np.nan), ("Q4_1", 2, np.inf), ("Q4_K", 0, -1.0), ("Q6_K", 208, np.inf)]
)
def test_numbers_that_cannot_be_right_are_refused(tmp_path: Path, kind: str, at: int, value: float) -> None:
    raw = blocks(kind, SHAPE, np.random.default_rng(1))
    raw[7, at : at + 2] = np.array([value], np.float16).view(np.uint8)
    with pytest.raises(UserError, match=r"t, row 7 of the model's.*"):
        list(GgufRows(stored(tmp_path / "t", kind, raw)).tiles())


def test_a_negative_scale_below_the_lowest_code(tmp_path: Path) -> None:
    raw = blocks("Q8_0", SHAPE, np.random.default_rng(1))
    raw[3, :3] = [*np.array([-1], np.float16).view(np.uint8), 0x80]
    with pytest.raises(UserError, match="whose opposite is no code"):
        list(GgufRows(stored(tmp_path / "t", "Q8_0", raw)).tiles())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Array]]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, dict(llama(path))


def reference(floats: dict[str, Array], ids: Array) -> Array:
    """The logits of transformers' own Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SIZES["vocab"], hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    own = LlamaForCausalLM(config).eval()
    own.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in floats.items()}, strict=False)
    own.tie_weights()
    with torch.inference_mode():
        return np.asarray(own(torch.from_numpy(ids)).logits[0])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["exact", "auto"])
def test_an_artifact_is_the_model_of_the_files_weights(
    model: tuple[Path, dict[str, Array]], tmp_path: Path, preset: Any
) -> None:
    """Thirteen types in one model; `exact` keeps its logits, and no matrix is in the file but in codes."""
    path, floats = model
    compile_model(Request(path, ("x86",), tmp_path / "out", cpu_preset=preset))
    ids = np.random.default_rng(2).integers(0, SIZES["vocab"], (1, 40))
    got = np.concatenate(list(artifact_logits(tmp_path / "out")(ids)))
    want = reference(floats, ids)
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < {"exact": 1e-3, "auto": 1e-1}[preset]
    written = sum(f.stat().st_size for f in (tmp_path / "out/x86").glob("model.onnx*"))
    assert written < 1.6e6  # 1.25 M weights: in 16 bits 2.5 MB, and the graph


@pytest.mark.slow
def test_floats_of_the_same_file(model: tuple[Path, dict[str, Array]], tmp_path: Path) -> None:
    path, floats = model
    loaded = load(path, requantize=True)
    for name, want in floats.items():
        np.testing.assert_array_equal(whole(loaded.tensors[name]), want)
    assert (loaded.folder / "config.json").is_file()
    with pytest.raises(UserError, match="requantize is for a GGUF file"):
        load(tmp_path, requantize=True)


def test_an_engine_has_the_table_beside_the_heads_codes(model: tuple[Path, dict[str, Array]]) -> None:
    said, planned = inspect(model[0]).bytes_on, plan(Request(model[0], ("x86", "sm89"), Path("o")))
    for kind, target in (("onnxruntime", "x86"), ("tensorrt", "sm89")):
        assert abs(said[kind] / planned.size(target) - 1) < 0.04, kind


def test_a_split_file_is_one(model: tuple[Path, dict[str, Array]], tmp_path: Path) -> None:
    whole_file = open_gguf(model[0])
    reader = gguf.GGUFReader(model[0])
    for number, some in enumerate((reader.tensors[:5], reader.tensors[5:])):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number + 1:05}-of-00002.gguf", "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in some:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    first = gguf_at(tmp_path)
    assert first == tmp_path / "m-00001-of-00002.gguf"
    found = open_gguf(first)
    assert set(found.tensors) == set(whole_file.tensors)
    for name, tensor in found.tensors.items():
        np.testing.assert_array_equal(whole(tensor), whole(whole_file.tensors[name]))
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "other.gguf")
    with pytest.raises(UserError, match="parts of a split file are missing"):
        open_gguf(first)
    with pytest.raises(UserError, match="several GGUF files"):
        gguf_at(tmp_path)


def test_a_type_without_equal_steps_is_named(tmp_path: Path) -> None:
    kinds = [dict.fromkeys(layer, "Q8_0") for layer in KINDS_OF_LAYERS]
    kinds[1]["ffn_up"] = "IQ3_S"
    path = tmp_path / "iq.gguf"
    floats = llama(path, kinds=tuple(kinds))
    with pytest.raises(UserError, match=r"(?s)IQ3_S has no codes of equal steps.*--requantize") as refused:
        load(path)
    assert "blk.1.ffn_up.weight" in str(refused.value)
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(whole(load(path, requantize=True).tensors[name]), floats[name])
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.1.ffn_gate.weight") + len("blk.1.ffn_gate.weight") + 4 + 2 * 8  # its rank and sizes
    data[at] = GGMLQuantizationType.I8
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"(?s)blk\.1\.ffn_gate\.weight.*nobody here reads tensors of type I8"):
        load(path, requantize=True)


@pytest.mark.parametrize("given", [{"quant": "a8w8"}, {"quant": "a16w4"}, {"group_size": 64}, {"quant": "none"}])
def test_what_a_file_in_codes_cannot_be(model: tuple[Path, dict[str, Array]], given: dict[str, Any]) -> None:
    loaded = load(model[0])
    request = Request(model[0], ("x86",), Path("o"), **given)
    for refuse in (check_early, lambda asked: resolve(asked, loaded)):
        with pytest.raises(UserError, match=r"(?s)tiny\.gguf: .*--requantize"):
            refuse(request)
    with pytest.raises(UserError, match="max_length is more than the model was made for"):
        check_early(Request(model[0], ("x86",), Path("o"), max_length=1000))
    assert loaded.reader == detect(loaded.tensors)
    assert resolve(Request(model[0], ("x86",), Path("o")), loaded) is not None


def test_an_error_behind_the_folder_that_is_made_names_the_file(
    model: tuple[Path, dict[str, Array]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, **_: Any) -> None:
        raise ValueError(f"{folder / 'config.json'} is odd")

    monkeypatch.setattr("instantrt.compiler.frontend.hf.open_checkpoint", fail)
    with pytest.raises(UserError) as caught:
        load(model[0])
    assert (caught.value.where, caught.value.found) == (str(model[0]), f"ValueError: {model[0]} is odd")


def test_a_folder_of_one_file_and_what_lies_beside_it(model: tuple[Path, dict[str, Array]], tmp_path: Path) -> None:
    for name in ("Tiny.GGUF", "mmproj-Tiny.gguf"):
        (tmp_path / name).write_bytes(model[0].read_bytes())
    (tmp_path / "config.json").write_text("{}")
    loaded = load(tmp_path)
    assert loaded.notes[0].startswith("config.json beside Tiny.GGUF is not read")
    with pytest.raises(UserError, match="a GGUF file, where a checkpoint's folder is due"):
        refuse_gguf(tmp_path)
    what = "truncate_dim is for a sentence-transformers folder"
    for path in (tmp_path, model[0]):
        with pytest.raises(UserError, match=rf"^{path}: {what}"):
            load(path, truncate_dim=8)
    assert [problem.what for problem in inspect(tmp_path, truncate_dim=8).problems] == [what]
    assert inspect(HERE / "ct-w8a16", requantize=True).problems[0].what == "requantize is for a GGUF file"
    text = tmp_path / "text"
    text.write_text("")
    check_text(Request(tmp_path, ("x86",), Path("o"), quant="a16w4", calibration=text))  # its tokenizer is made
    sizes = {"hidden_size": 48, "intermediate_size": 48}  # of another model: those of the file are its metadata's
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    check_early(Request(tmp_path, ("x86",), Path("o"), requantize=True, quant="a16w4", group_size=32))
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer", "path": ""}]')
    with pytest.raises(UserError, match="a pipeline around one is not read") as caught:
        load(tmp_path)
    assert caught.value.fix.endswith(str(tmp_path / "Tiny.GGUF"))


def test_another_byte_order_is_named(tmp_path: Path) -> None:
    llama(tmp_path / "big.gguf", kinds=(), endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UserError, match="a big-endian GGUF file"):
        open_gguf(tmp_path / "big.gguf")
