"""Encoders, classifiers and embedding models: exported as transformers and sentence-transformers compute them.

Tiny random models of each family, lowered for ONNX Runtime, on a batch that is padded on both sides.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file, save_file

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.calibrate import feeds_of_text
from instantrt.compiler.accuracy.data import load_data
from instantrt.compiler.accuracy.subjects import subjects
from instantrt.compiler.accuracy.texts import ranked_alike
from instantrt.compiler.accuracy.verify import verify
from instantrt.compiler.artifact.manifest import read_manifest
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.compile import VerificationError, compile_model
from instantrt.compiler.frontend import hf, load
from instantrt.compiler.frontend.model import EncoderShape, FloatModel
from instantrt.compiler.frontend.skeleton import untouched_parameters
from instantrt.compiler.inspect import inspect
from instantrt.compiler.plan import plan
from instantrt.compiler.request import Request
from instantrt.compiler.smoke.steps import encoder_steps
from instantrt.compiler.target import find_target
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import Array
from instantrt.passes.core.linear import bias_behind
from instantrt.passes.core.rewrite import PassLog
from instantrt.plugins.weight_only_gemm.op import OP
from tests.checkpoints import gptq_tensors, write_checkpoint
from tests.compiler.encoder_models import SIZES, make, sentence, tokenizer
from tests.conftest import TEXT, plugin_library

FUSED = "encoder.layer.0.attention.qkv_proj"  # of GTE
AUTOS = {
    "hidden": "AutoModel",
    "classify": "AutoModelForSequenceClassification",
    "classify_tokens": "AutoModelForTokenClassification",
    "fill_mask": "AutoModelForMaskedLM",
}
# Every family with one head, every head with a family; a decoder that only reads, and one that reads both ways.
CASES = (
    ("bert", "hidden"),
    ("bert", "classify"),
    ("roberta", "classify"),
    ("xlm-roberta", "hidden"),
    ("distilbert", "classify"),
    ("modernbert", "hidden"),
    ("mpnet", "fill_mask"),
    ("electra", "classify_tokens"),
    ("albert", "hidden"),
    ("deberta-v2", "classify"),
    ("convbert", "fill_mask"),  # whose convolutions are written to as they are made
    ("gte", "hidden"),  # whose file has q, k, v in one, and gate and up
    ("qwen3", "classify"),
    ("gemma3_text", "hidden"),
)
LENGTH = 12
CLOSE = 1e-5  # of the largest value


def batch(model: FloatModel, *, left: bool = True) -> dict[str, Array]:
    """Three texts: a whole one, one padded on the right, one on the left."""
    assert model.encoder is not None
    ids = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (3, LENGTH))
    mask = np.ones_like(ids)
    mask[1, 8:] = 0
    mask[2, :3] = not left
    ids[mask == 0] = SIZES["pad_token_id"]
    kinds = np.tile(np.arange(LENGTH) > 5, (3, 1)).astype(np.int64)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
    return {name: feeds[name] for name in model.encoder.input_names()}


def lowered(model: FloatModel, folder: Path) -> ort.InferenceSession:
    """What an artifact for x86 without quantization is."""
    request = Request(folder, ("x86",), folder)
    graph = pipeline.normalize(model.graph, PassLog())
    write_model(pipeline.lower_onnxruntime(graph, find_target("x86"), request, PassLog()), folder / "m.onnx")
    return ort.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])


def close(got: Array, want: Array) -> bool:
    return bool(np.abs(got - want).max() <= CLOSE * np.abs(want).max())


@pytest.mark.parametrize(("family", "task"), CASES)
def test_an_encoder_is_what_transformers_makes_of_it(family: str, task: str, tmp_path: Path) -> None:
    theirs = make(family, AUTOS[task], tmp_path)
    model = load(tmp_path)
    assert model.encoder is not None
    assert (model.encoder.task, model.llm) == (task, None)
    absolute = family in ("roberta", "xlm-roberta", "mpnet")  # their positions are counted from the padding's number
    feeds = batch(model, left=not absolute)
    with torch.no_grad():
        output = theirs(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    want = output.last_hidden_state if task == "hidden" else output.logits
    counts = feeds["attention_mask"].astype(bool)
    meant = np.s_[:] if task == "classify" else counts
    session = lowered(model, tmp_path)
    (got,) = session.run(None, feeds)
    assert close(got[meant], want.numpy()[meant])
    alone = {name: value[1:2, :8] for name, value in feeds.items()}
    (row,) = session.run(None, alone)
    if family == "convbert":  # its convolutions see what a text is padded with
        with torch.no_grad():
            same = theirs(**{name: torch.from_numpy(value) for name, value in alone.items()}).logits.numpy()
    else:
        same = got[1:2] if task == "classify" else got[1:2, :8]
    assert close(row, same)
    assert model.text["labels"] == (["bad", "fair", "good"] if task.startswith("classify") else [])


def test_a_tensor_of_parts_that_the_file_has_apart_too(tmp_path: Path) -> None:
    make("gte", "AutoModel", tmp_path)
    path, fused = tmp_path / "model.safetensors", f"{FUSED}.weight"
    part = "layers.0.self_attn.k_proj.weight"
    tensors = load_file(path)
    found = inspect(tmp_path)
    assert (found.problems, found.tensors, found.account.parameters) == ((), len(tensors), len(tensors))
    tensors[part] = np.split(tensors[fused], 3)[1].copy()
    save_file(tensors, path)
    load(tmp_path)  # byte for byte what the part is
    found = inspect(tmp_path)
    assert (found.problems, found.tensors, found.account.parameters) == ((), len(tensors), len(tensors) - 1)
    assert [(each.name, each.why) for each in found.account.harmless] == [(part, f"equal to {fused}, byte for byte")]
    tensors[part] += 1
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"two tensors for {re.escape(part)}(.|\n)*{fused}"):
        load(tmp_path)
    (problem,) = inspect(tmp_path).problems  # told, and the rest looked at
    assert problem.what == f"two tensors for {part}, and they differ"


def quantized_in_one(kind: str, tensors: dict[str, Array]) -> dict[str, Any]:
    """`FUSED` of some kind, and its config."""
    del tensors[f"{FUSED}.weight"]
    ones = np.ones((2, 96), int)
    if kind == "gptq":
        tensors |= gptq_tensors(FUSED, np.ones((32, 96), int), ones, ones / 8, 4, np.arange(32) // 16)
        return {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
    tensors[f"{FUSED}.weight"] = np.ones((96, 32), np.int8)
    tensors[f"{FUSED}.weight_scale"] = np.ones((96, 1), np.float32)
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    group = {"group_0": {"targets": [f"re:.*{kind}"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": group}


@pytest.mark.parametrize("kind", ["gptq", "_proj$"])  # the latter is how compressed-tensors finds its layers
def test_what_is_quantized_in_one_is_not_cut(kind: str, tmp_path: Path) -> None:
    make("gte", "AutoModel", tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = quantized_in_one(kind, tensors)
    write_checkpoint(tmp_path, config, tensors)
    what = "GteModel has in parts what is quantized in one here: quantized tensors are not cut"
    with pytest.raises(UserError, match=rf"{what}(.|\n)*k_proj(.|\n)*{FUSED}(.|\n)*with --quant"):
        load(tmp_path)
    first, *others = inspect(tmp_path).problems
    assert first.what == what
    assert not [each for each in others if "self_attn.q_proj" in str(each)], others


@pytest.mark.parametrize(("name", "wanted"), [(f"{FUSED}.weight", [96, 32]), (f"{FUSED}.bias", [96])])
def test_what_cannot_be_cut_into_equal_parts(name: str, wanted: list[int], tmp_path: Path) -> None:
    make("gte", "AutoModel", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for rows in (95, 93):
        save_file({**tensors, name: tensors[name][:rows].copy()}, tmp_path / "model.safetensors")
        (problem,) = inspect(tmp_path).problems
        assert problem.what == f"tensor {name} disagrees with the model's config"
        assert (problem.expected, problem.found) == (f"shape {wanted}", f"shape {[rows, *wanted[1:]]} float32")


@pytest.mark.parametrize("family", ["bert", "albert", "deberta-v2"])
def test_weights_of_16_bits(family: str, tmp_path: Path) -> None:
    """A table of so few bytes that the graph has them, a matrix of all layers, one of two products in a layer."""
    theirs = make(family, "AutoModel", tmp_path).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    compile_model(Request(tmp_path, ("x86",), tmp_path / "out", smoke=False))
    feeds = batch(load(tmp_path))
    with torch.no_grad():
        output = theirs.float()(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    session = ort.InferenceSession(tmp_path / "out/x86/model.onnx", providers=["CPUExecutionProvider"])
    counts = feeds["attention_mask"].astype(bool)
    assert close(session.run(None, feeds)[0][counts], output.last_hidden_state.numpy()[counts])


def test_a_convolution_is_built_without_storage() -> None:
    """DeBERTa-v2's larger models have one, and SqueezeBERT is made of them."""
    with untouched_parameters():
        without = torch.nn.Conv1d(4, 6, 3)
    assert without.weight.untyped_storage().nbytes() == without.bias.untyped_storage().nbytes() == 4
    assert torch.nn.Conv1d(4, 6, 3).weight.std() > 0


def test_the_layers_of_an_encoder_are_exported_once(tmp_path: Path) -> None:
    make("bert", "AutoModel", tmp_path, num_hidden_layers=4)
    assert not any("exported" in note for note in load(tmp_path).notes)


def pooling(**fields: Any) -> tuple[str, dict[str, Any], dict[str, torch.Tensor]]:
    return "Pooling", {"word_embedding_dimension": 32, **fields}, {}


DENSE = {
    "in_features": 64,
    "out_features": 24,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
}
POOLINGS: dict[str, Any] = {
    "mean": lambda x, m: (x * m[..., None]).sum(1) / m.sum(1)[:, None],
    "mean_sqrt_len_tokens": lambda x, m: (x * m[..., None]).sum(1) / np.sqrt(m.sum(1))[:, None],
    "max": lambda x, m: np.where(m[..., None] == 1, x, -np.inf).max(1),
    "cls": lambda x, m: np.stack([row[keep][0] for row, keep in zip(x, m == 1, strict=True)]),
    "lasttoken": lambda x, m: np.stack([row[keep][-1] for row, keep in zip(x, m == 1, strict=True)]),
    "weightedmean": lambda x, m: np.stack(
        [np.average(row[keep], 0, np.arange(1, keep.sum() + 1)) for row, keep in zip(x, m == 1, strict=True)]
    ),
}


def test_poolings(tmp_path: Path) -> None:
    """All of them joined, as one module may."""
    theirs = make("bert", "AutoModel", tmp_path)
    sentence(tmp_path, pooling(pooling_mode=list(POOLINGS)))
    model = load(tmp_path)
    feeds = batch(model)
    with torch.no_grad():
        hidden = theirs(**{name: torch.from_numpy(value) for name, value in feeds.items()}).last_hidden_state.numpy()
    (got,) = lowered(model, tmp_path).run(None, feeds)
    for mode, part in zip(POOLINGS, np.split(got, len(POOLINGS), axis=1), strict=True):
        assert close(part, POOLINGS[mode](hidden, feeds["attention_mask"])), mode


def test_a_pipeline_of_every_module(tmp_path: Path) -> None:
    """Of a folder that names another head and has its tensors; the first numbers of unit vectors are such again."""
    theirs = make("bert", "AutoModelForMaskedLM", tmp_path)
    torch.manual_seed(1)
    linear, norm = torch.nn.Linear(64, 24), torch.nn.LayerNorm(24)
    torch.nn.init.normal_(norm.weight)
    sentence(
        tmp_path,
        (
            "Pooling",
            {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            {},
        ),
        ("Dropout", {"dropout": 0.1}, {}),
        ("Dense", DENSE, {f"linear.{k}": v.detach() for k, v in linear.named_parameters()}),
        ("LayerNorm", {"dimension": 24}, {f"norm.{k}": v.detach() for k, v in norm.named_parameters()}),
        ("Normalize", {}, {}),
        prompts={"query": "find: "},
        default_prompt_name="query",
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "3_Dense").rename(tmp_path / "a/3.1")  # a dot is no part of a module's name in torch
    (tmp_path / "modules.json").write_text((tmp_path / "modules.json").read_text().replace("3_Dense", "a/3.1"))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    model = load(tmp_path, truncate_dim=10)
    assert model.encoder is not None
    assert (model.encoder.task, model.encoder.width, model.encoder.max_length) == ("embed", 10, 20)
    assert model.text == {"labels": [], "lowercase": True, "prompts": {"query": "find: "}, "default_prompt": "query"}
    feeds = batch(model)
    with torch.no_grad():
        given = {name: torch.from_numpy(value) for name, value in feeds.items()}
        x = theirs.bert(**given).last_hidden_state
        mean = torch.from_numpy(POOLINGS["mean"](x.numpy(), feeds["attention_mask"])).float()
        first = torch.from_numpy(POOLINGS["cls"](x.numpy(), feeds["attention_mask"]))
        want = torch.nn.functional.normalize(norm(torch.tanh(linear(torch.cat([first, mean], 1))))[:, :10])
    (got,) = lowered(model, tmp_path).run(None, feeds)
    assert close(got, want.numpy())


def test_a_language_model_in_a_folder_of_its_own(tmp_path: Path) -> None:
    inner = tmp_path / "0_Transformer"
    make("bert", "AutoModel", inner)
    sentence(tmp_path, ("Pooling", {"word_embedding_dimension": 32}, {}))
    listed = json.loads((tmp_path / "modules.json").read_text())
    listed[0]["path"] = inner.name
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    model = load(tmp_path)
    assert model.folder == inner
    assert {path.relative_to(tmp_path).as_posix() for path in model.files} == {
        "modules.json",
        "1_Pooling/config.json",
        "0_Transformer/config.json",
        "0_Transformer/model.safetensors",
    }


WEIGHTS = {"linear.weight": torch.ones(24, 64), "linear.bias": torch.ones(24)}
BAD: dict[str, tuple[list[Any], str]] = {
    "no pooling": ([("Normalize", {}, {})], "does not begin with a pooling"),
    "a module of somebody else": ([pooling(), ("mine", {}, {})], "that has my.models.mine"),
    "another module": ([pooling(), ("WeightedLayerPooling", {}, {})], "that has WeightedLayerPooling"),
    "a prompt without a part in it": ([pooling(include_prompt=False)], "include_prompt of a sentence-transformers"),
    "a key that nobody knows": ([pooling(temperature=2)], "temperature of a sentence-transformers module is not known"),
    "a pooling that nobody knows": ([pooling(pooling_mode="median")], "a way of pooling that is not known"),
    "an activation of its own": (
        [pooling(), ("Dense", {**DENSE, "activation_function": "os.system"}, WEIGHTS)],
        "activation_function of a sentence-transformers module has a value",
    ),
    "a size that is none": ([pooling(), ("Dense", {**DENSE, "in_features": 1e30}, WEIGHTS)], "in_features is no size"),
    "another size": (
        [pooling(), ("Dense", {**DENSE, "in_features": 48}, WEIGHTS)],
        "does not fit the module before it",
    ),
    "weights of another size": (
        [pooling(), ("Dense", {**DENSE, "in_features": 32, "out_features": 1 << 40}, WEIGHTS)],
        "disagrees with the model's config",
    ),
    "two language models": ([pooling(), ("Transformer", {}, {})], "that has several of Transformer"),
    "too many": ([pooling()] + [("Normalize", {}, {})] * 200, "a pipeline of more modules than any has"),
    "no weights": ([pooling(), ("Dense", {**DENSE, "in_features": 32}, {})], "no safetensors weights"),
    "a weight that it has not": (
        [
            pooling(),
            ("Dense", {**DENSE, "in_features": 32, "bias": False}, {**WEIGHTS, "linear.weight": torch.ones(24, 32)}),
        ],
        "nothing uses tensor 2_Dense.linear.bias",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_pipeline_that_is_none_is_refused_by_name(what: str, tmp_path: Path) -> None:
    modules, words = BAD[what]
    make("bert", "AutoModel", tmp_path)
    sentence(tmp_path, *modules)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert words in caught.value.what


def test_a_pipeline_that_reads_texts_as_chats_is_refused(tmp_path: Path) -> None:
    make("bert", "AutoModel", tmp_path)
    sentence(tmp_path, pooling())
    modality = {"method": "forward", "method_output_name": "last_hidden_state"}
    settings = tmp_path / "sentence_bert_config.json"
    settings.write_text(json.dumps({"modality_config": {"text": modality}}))
    assert of_folder(tmp_path)[1] == 32
    settings.write_text(json.dumps({"modality_config": {"text": modality, "message": modality}}))
    with pytest.raises(UserError, match="modality_config of a sentence-transformers module has a value"):
        of_folder(tmp_path)


def test_what_a_folder_says_of_texts(tmp_path: Path) -> None:
    """Where its tokenizer cuts them, if nothing else says so, and how many numbers of an embedding it keeps."""
    make("bert", "AutoModel", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 12}')
    sentence(tmp_path, pooling(), truncate_dim=8)
    assert of_folder(tmp_path) == (12, 8)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 30}')
    assert of_folder(tmp_path, truncate_dim=16) == (30, 16)


def of_folder(folder: Path, **fields: Any) -> tuple[int, int]:
    """Tokens of a text, and numbers of an embedding."""
    opened = hf.open_checkpoint(folder, **fields)
    assert isinstance(opened.taken.facts.shape, EncoderShape)
    shape = hf.limited(opened.taken.facts.shape, opened)
    return shape.max_length, shape.width


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"logits": "all"}, "logits does nothing without a causal LM"),
        ({"bits_per_weight": 6.0, "quant": "a16w8"}, "a budget is of causal LMs"),
        *(({"lm_head": form, "quant": "a16w8"}, f"lm_head {form} does nothing") for form in ("int8", "float")),
    ],
)
def test_options_of_language_models_are_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    make("bert", "AutoModel", tmp_path / "model")
    with pytest.raises(UserError, match=words):
        compile_model(Request(tmp_path / "model", ("x86",), tmp_path / "out", **fields))


def test_the_head_of_a_masked_lm_is_one(tmp_path: Path) -> None:
    make("bert", "AutoModelForMaskedLM", tmp_path)
    request, head = Request(tmp_path, ("x86",), tmp_path / "out", quant="a16w8"), "cls.predictions.decoder"
    for form in ("int8", "float"):
        assert (head in plan(replace(request, lm_head=form)).twins["x86"].quantized) == (form == "int8")
    with pytest.raises(UserError, match=r"(?s)lm_head int8 does nothing.*ignored by"):
        plan(replace(request, lm_head="int8", ignore=(head,)))


def test_what_only_embeddings_have(tmp_path: Path) -> None:
    make("bert", "AutoModel", tmp_path)
    with pytest.raises(UserError, match="truncate_dim is for a model of sentence embeddings"):
        load(tmp_path, truncate_dim=8)
    sentence(tmp_path, pooling())
    for width in (33, 0, -1):
        with pytest.raises(UserError, match=r"Truncate .* does not fit"):
            hf.open_checkpoint(tmp_path, truncate_dim=width)


@pytest.mark.parametrize(
    ("index", "path", "words"),
    [
        (1, "../elsewhere", "a module outside of the folder"),
        (1, "/etc", "a module outside of the folder"),
        *((1, path, "a module without a path") for path in (5, None, "a\0", "\ud800", "a" * 300)),
        (0, "elsewhere", "the folder of the language model is not there"),
        (0, "config.json", "the folder of the language model is not there"),
    ],
)
def test_modules_lie_in_the_folder(index: int, path: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    sentence(tmp_path, pooling())
    listed = json.loads((tmp_path / "modules.json").read_text())
    listed[index]["path"] = path
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=words):
        load(tmp_path)


MOODS = {"0": "bad", "1": "fair", "2": "good"}
LABELS: dict[str, tuple[dict[str, Any], str]] = {
    "two of three": ({"id2label": {"0": "bad", "1": "good"}}, r"classifier\.(weight|bias) disagrees"),
    "none": ({"id2label": None}, "has to say 3 labels, not 2"),
    "two of three, and a count": ({"id2label": {"0": "bad", "1": "good"}, "num_labels": 3}, "names other labels than"),
    "a gap": ({"id2label": {"0": "bad", "1": "fair", "3": "good"}}, "expected: labels 0 to 2"),
    "one name twice": ({"id2label": MOODS | {"2": "bad"}}, "two labels have one name"),
    "a list": ({"id2label": ["bad", "fair", "good"]}, "no object of labels by number"),
    "names for numbers": ({"id2label": {name: number for number, name in MOODS.items()}}, "no object of labels"),
    "nothing for a name": ({"id2label": MOODS | {"2": None}}, "no object of labels by number"),
    "a long number": ({"id2label": MOODS | {"9" * 5000: "x"}}, "no object of labels by number"),
}


@pytest.mark.parametrize("what", LABELS)
def test_labels_that_disagree_with_the_head(what: str, tmp_path: Path) -> None:
    make("bert", "AutoModelForSequenceClassification", tmp_path)
    said, words = LABELS[what]
    config = {**json.loads((tmp_path / "config.json").read_text()), "label2id": None, **said}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(UserError, match=words):
        hf.open_checkpoint(tmp_path)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "mpnet", "bert"])
@pytest.mark.parametrize("pad", [None, -1, 1, 63])
def test_positions_that_begin_behind_padding(family: str, pad: int | None, tmp_path: Path) -> None:
    """As transformers counts them; MPNet has a number of its own, and the one of its class for all."""
    make(family, "AutoModel", tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), "pad_token_id": pad}
    (tmp_path / "config.json").write_text(json.dumps(config))
    left = {"bert": 64, "mpnet": 62}.get(family, 0 if pad is None else 63 - pad)
    if left > 0:
        assert of_folder(tmp_path)[0] == left
    else:
        with pytest.raises(UserError, match="begin behind pad_token_id, which leaves none"):
            of_folder(tmp_path)


@pytest.mark.slow
def test_a_gptq_checkpoint_of_an_encoder(tmp_path: Path) -> None:
    """Codes, scales, zero points and the order of inputs: what a dequantized model in float32 computes with."""
    theirs, random = make("bert", "AutoModelForSequenceClassification", tmp_path), np.random.default_rng(0)
    stored = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    for name in [name for name, tensor in stored.items() if ".layer." in name and tensor.ndim == 2]:
        (n, k), size = stored.pop(name).shape, 16
        codes, zero = random.integers(0, 16, (k, n)), random.integers(0, 16, (k // size, n))
        scale = random.uniform(0.01, 0.04, zero.shape).astype(np.float16)
        group = random.permutation(np.arange(k) // size)
        stored |= gptq_tensors(name.removesuffix(".weight"), codes, zero, scale, 4, group)
        weight = (codes - zero[group]) * scale[group].astype(np.float32)
        theirs.state_dict()[name].copy_(torch.from_numpy(weight.T))
    method = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}
    config = json.loads((tmp_path / "config.json").read_text())
    write_checkpoint(tmp_path, {**config, "quantization_config": method}, stored)
    compile_model(Request(tmp_path, ("x86",), tmp_path / "out", smoke=False))
    feeds = batch(load(tmp_path))
    with torch.no_grad():
        want = theirs(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits
    session = ort.InferenceSession(tmp_path / "out/x86/model.onnx", providers=["CPUExecutionProvider"])
    assert close(session.run(None, feeds)[0], want.numpy())


def test_the_plugin_takes_the_layers_of_an_encoder(tmp_path: Path) -> None:
    """Queries, keys and values as one, biases and GELU inside; the vectors are the twin's but for float16."""
    make("bert", "AutoModel", tmp_path)
    request = Request(tmp_path, ("sm89",), tmp_path, quant="a16w4", plugin=plugin_library(tmp_path), builder="kit")
    made, feeds = plan(request), batch(load(tmp_path))
    lowered, twin = made.lowered["sm89"], made.twins["sm89"].canonical
    assert [node.op for node in lowered.nodes].count(OP.name) == 2 * 4
    assert not {"Gelu", "Erf"} & {node.op for node in lowered.nodes}
    narrow, exact = (Evaluation(graph, feeds).take(graph.outputs[0].name) for graph in (lowered, twin))
    assert np.linalg.norm(narrow - exact) <= 5e-3 * np.linalg.norm(exact)


def test_four_bits_keep_the_mean_of_what_a_text_makes(tmp_path: Path) -> None:
    """What codes change on average is in the biases; what is padding does not count."""
    make("bert", "AutoModel", tmp_path)
    tokenizer(tmp_path)
    request = Request(tmp_path, ("x86",), tmp_path / "out", quant="a16w4", calibration=TEXT)
    made = plan(request)
    twin, feeds = made.twins["x86"], feeds_of_text(made.model, TEXT)
    assert min(int(each["attention_mask"].min()) for each in feeds) == 0  # some are padded
    (first,) = (node for node in twin.floating.nodes if node.name.endswith("layer.0.attention.self.query"))
    behind = bias_behind(first, SIZES["hidden_size"])
    assert behind is not None
    name = behind[0].outputs[0].name
    found = []
    for graph in (twin.floating, twin.canonical):
        rows = [Evaluation(graph, each).take(name)[each["attention_mask"] == 1] for each in feeds]
        found.append(np.concatenate(rows))
    wrong = found[1] - found[0]
    assert np.abs(wrong.mean(axis=0)).max() <= 1e-5 * np.abs(found[0]).max() < 1e-3 * np.abs(wrong).max()
    short = tmp_path / "short"
    short.write_text("These are a few words. They are not enough.")
    with pytest.raises(UserError, match="the calibration text is too short"):
        plan(replace(request, calibration=short))


@pytest.mark.parametrize(("quant", "least"), [("a16w8", 0.9999), ("a16w4", 0.97), ("a8w8", 0.999)])
def test_an_embedding_model_is_compiled_and_run(quant: str, least: float, tmp_path: Path) -> None:
    """The compile's own run holds the artifact against the twin, this against the model: the smallest cosine."""
    theirs = make("bert", "AutoModel", tmp_path / "model")
    sentence(tmp_path / "model", pooling(), ("Normalize", {}, {}))
    (artifact,) = compile_model(Request(tmp_path / "model", ("x86",), tmp_path / "out", quant=quant))
    assert artifact.encoder is not None
    assert artifact.encoder["task"] == "embed"
    assert len(artifact.quant) == 2 * 6
    feeds = batch(load(tmp_path / "model"))
    with torch.no_grad():
        given = {name: torch.from_numpy(value) for name, value in feeds.items()}
        hidden = theirs(**given).last_hidden_state.numpy()
    want = POOLINGS["mean"](hidden, feeds["attention_mask"])
    (got,) = ort.InferenceSession(tmp_path / "out" / artifact.path).run(None, feeds)
    assert np.linalg.norm(got, axis=1) == pytest.approx(1, abs=1e-5)
    assert ((got * want).sum(1) / np.linalg.norm(want, axis=1)).min() > least


def test_verify_says_how_alike_answers_are(tmp_path: Path) -> None:
    """In cosines, ranks and labels, with transformers as a form; a bound that is not kept is a verdict that fails."""
    make("bert", "AutoModelForSequenceClassification", tmp_path / "model")
    tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The harbour is grey. A boat comes late to it!\n\nFish are sold there\n\nno")
    request = Request(tmp_path / "model", ("x86",), tmp_path / "out", quant="a8w8", text=tmp_path / "text.txt")
    with pytest.raises(UserError, match="min_cosine does nothing without --verify"):
        compile_model(replace(request, min_cosine=0.9))
    compile_model(replace(request, min_cosine=0.9), verify=True)
    compile_model(replace(request, quant="a16w4", out=tmp_path / "four"), verify=True)  # reads its four bits back
    report = json.loads((tmp_path / "out/report/x86/report.json").read_text())
    assert {"rows": 3, "label_agreement": 1}.items() <= report["quantization"].items()
    assert 0.9 < report["quantization"]["cosine_min"] < 1
    with pytest.raises(VerificationError, match=r"the smallest cosine, 0\.9"):
        compile_model(replace(request, min_cosine=1), verify=True)
    planned = plan(request)
    data = load_data(planned.model, request.text)
    (subject,) = subjects(planned, replace(request, out=tmp_path / "out"), read_manifest(tmp_path / "out"))
    (tmp_path / "files").mkdir()
    found = verify(subject, data, tmp_path / "files", forms=("transformers", "float"))
    assert [c.kind for c in found.comparisons] == ["export"]
    assert found.comparisons[0].relative_l2 < CLOSE


def test_rank_agreement_is_spearmans() -> None:
    a = np.random.default_rng(0).standard_normal((40, 8))
    noisy = a + np.random.default_rng(1).standard_normal(a.shape) * 0.3
    assert ranked_alike(a, 3 * a) == pytest.approx(1)
    assert 0.7 < ranked_alike(a, noisy) < 0.99
    assert abs(ranked_alike(a, a[::-1] ** 2)) < 0.3


def test_loud_inputs_of_int8_layers_are_smoothed(tmp_path: Path) -> None:
    """Two channels are loud, where little is made of them: others lose less than by the formula alone."""
    theirs, loud = make("bert", "AutoModel", tmp_path / "model"), [3, 17]
    for name, parameter in theirs.named_parameters():
        if "LayerNorm" in name:
            parameter.data[loud] *= 40
        if name.endswith(("self.query.weight", "self.key.weight", "self.value.weight", "intermediate.dense.weight")):
            parameter.data[:, loud] /= 40
    theirs.save_pretrained(tmp_path / "model")
    feeds = batch(load(tmp_path / "model"))
    with torch.no_grad():
        want = theirs(**{name: torch.from_numpy(value) for name, value in feeds.items()}).last_hidden_state.numpy()
    errors = []
    for search in ("none", "activations"):
        out = tmp_path / search
        compile_model(Request(tmp_path / "model", ("x86",), out, quant="a8w8", search=search))
        (got,) = ort.InferenceSession(out / "x86/model.onnx").run(None, feeds)
        errors.append(np.linalg.norm(np.delete(got - want, loud, axis=2)[feeds["attention_mask"] == 1]))
    assert errors[1] < errors[0] / 10


def test_values_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    """In one text of several is enough, where a model without an interface may have some."""
    theirs = make("bert", "AutoModel", tmp_path / "model")
    (step,) = encoder_steps(load(tmp_path / "model").graph, EncoderShape("hidden", 2, SIZES["vocab_size"], 32, 64))
    first, second = step.feeds["input_ids"]
    theirs.embeddings.word_embeddings.weight.data[next(iter(set(first) - set(second)))] = np.nan
    theirs.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="the model itself gives values that are not finite"):
        compile_model(Request(tmp_path / "model", ("x86",), tmp_path / "out"))
