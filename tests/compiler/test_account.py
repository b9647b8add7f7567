"""Every tensor and every file of a checkpoint is used, harmless with a reason, or an error that names it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from instantrt.compiler.artifact.manifest import read_manifest
from instantrt.compiler.checkpoint import INDEX, SINGLE, read_checkpoint, same_bytes
from instantrt.compiler.compile import compile_model
from instantrt.compiler.frontend import hf
from instantrt.compiler.frontend.account import take_account
from instantrt.compiler.frontend.architecture import CAUSAL_LM, check_architectures, head_of
from instantrt.compiler.frontend.facts import facts_of
from instantrt.compiler.frontend.pieces import pieces_of
from instantrt.compiler.frontend.side_files import READ, account_of_files
from instantrt.compiler.frontend.skeleton import build_skeleton, llm_shape
from instantrt.compiler.inspect import inspect
from instantrt.compiler.plan import Plan
from instantrt.compiler.quant.readers import announced_reader
from instantrt.compiler.request import Request
from instantrt.compiler.watch import Watch
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array, FileTensor, whole
from instantrt.tools.bench.synthetic import write_safetensors
from tests.checkpoints import DOWN_PROJ, NAMES, Q_PROJ, TINY, config_of, whole_checkpoint, write_checkpoint
from tests.commands import invoke
from tests.models import SIZES

ONE = np.ones(3, np.float32)
LLAMA = {**SIZES, "model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": True}
TIED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama(folder: Path, change: dict[str, Array | None], **fields: Any) -> Path:
    """A llama of one layer, every weight different, with tensors added, replaced or (None) lost."""
    model = build_skeleton({**LLAMA, **fields}, folder, False)
    tensors = {name: np.full(tuple(p.shape), i + 1, np.float32) for i, (name, p) in enumerate(model.named_parameters())}
    tensors |= {name: array for name, array in change.items() if array is not None}
    return write_checkpoint(
        folder, {**LLAMA, **fields}, {n: a for n, a in tensors.items() if n not in change or change[n] is not None}
    )


def opened(folder: Path) -> hf.OpenCheckpoint:
    return hf.open_checkpoint(folder)


@pytest.mark.parametrize("name", NAMES)
def test_the_quantization_takes_what_it_reads(name: str, tmp_path: Path) -> None:
    """Of seven layers: codes, scales and whatever else the format has; the rest are parameters."""
    found = opened(whole_checkpoint(name, tmp_path)).taken
    parts = {n.rpartition(".")[2] for n in found.tensors} - {"weight", "bias"}
    quantized = [n for n, t in found.tensors.items() if n.rpartition(".")[2] in parts or t.dtype == np.int8]
    harmless = sum(entry.count for entry in found.account.harmless)
    assert found.account.quantization == len(quantized) - harmless
    assert found.account.parameters == len(found.tensors) - len(quantized)


def test_static_activation_scales_are_harmless_by_name(tmp_path: Path) -> None:
    harmless = opened(whole_checkpoint("ct-w8a8-static", tmp_path)).taken.account.harmless
    assert len(harmless) == 7
    assert all(e.name.endswith(".input_scale") and "every token gets its own" in e.why for e in harmless)


HARMLESS: dict[str, tuple[str, Array]] = {
    "an old rope": ("model.layers.0.self_attn.rotary_emb.inv_freq", ONE),
    "the model's own buffer": ("model.rotary_emb.inv_freq", ONE),
    "a causal mask": ("model.layers.0.self_attn.bias", np.ones((1, 1, 4, 4), np.bool_)),
    "a masked bias": ("model.layers.0.self_attn.masked_bias", np.float32([-1e4])),
    "positions": ("model.embeddings.position_ids", np.arange(4)[None]),
    "ALBERT's pooler": ("albert.pooler.weight", np.ones((4, 4), np.float32)),
    "ALBERT's order of sentences": ("sop_classifier.classifier.bias", np.ones(2, np.float32)),
    "a counter": ("model.norm.num_batches_tracked", np.array([7])),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_a_harmless_tensor_is_kept_with_its_reason(what: str, tmp_path: Path) -> None:
    name, array = HARMLESS[what]
    account = opened(llama(tmp_path, {name: array})).taken.account
    (entry,) = account.harmless
    assert (entry.name, entry.count) == (name, 1)
    assert entry.why
    assert account.parameters == len(read_checkpoint(tmp_path)) - 1


def test_harmless_tensors_of_many_layers_are_one_line(tmp_path: Path) -> None:
    names = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": ONE for i in range(12)}
    (entry,) = opened(llama(tmp_path, names)).taken.account.harmless
    assert (entry.name, entry.count) == ("model.layers.*.self_attn.rotary_emb.inv_freq", 12)


def test_an_unknown_type_hurts_only_who_needs_the_tensor(tmp_path: Path) -> None:
    mask = np.ones((1, 1, 4, 4), ml_dtypes.float8_e5m2)
    assert opened(llama(tmp_path / "a", {"model.layers.0.self_attn.bias": mask})).taken.account.harmless
    with pytest.raises(UserError, match="is not a float tensor") as caught:
        opened(llama(tmp_path / "b", {"model.norm.weight": np.ones(64, ml_dtypes.float8_e4m3fn)}))
    assert caught.value.found == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("change", "words", "found"),
    [
        ({"model.layers.0.self_attn.bias": ONE}, "nothing uses tensor", "a bias that"),  # no mask: rank 1
        ({"model.layers.0.mlp.act.scales": ONE}, "nothing uses tensor", "AWQ's scales"),
        ({"model.layers.3.input_layernorm.weight": ONE}, "nothing uses tensor", "layer 3, and the config announces 1"),
        ({"mtp.layers.0.weight": ONE, "x": ONE, "y": ONE}, "nothing uses tensor mtp", "speculative"),
        ({"model.norm.weight": None}, "has no tensor model.norm.weight", ""),
        ({"model.norm.weight": ONE}, "disagrees with the model's config", "[3]"),
        ({"model.layers.0.mlp.up_proj.weight_packed": ONE}, "nothing uses tensor", "a quantized layer"),
    ],
)
def test_everything_else_is_an_error_that_names_it(
    change: dict[str, Array | None], words: str, found: str, tmp_path: Path
) -> None:
    folder = llama(tmp_path, change)
    with pytest.raises(UserError) as caught:
        opened(folder)
    assert words in caught.value.what
    assert found in caught.value.found
    assert [p.what for p in inspect(folder).problems] == [caught.value.what]  # as compile says


def test_a_tied_weight_of_two_values_is_untied(tmp_path: Path) -> None:
    """And of one value stays tied: its second copy is harmless."""
    table = whole(read_checkpoint(llama(tmp_path / "tied", {}))[TIED])
    same = opened(llama(tmp_path / "same", {HEAD: table.copy()}))
    assert (same.taken.facts.groups[0], same.taken.untied) == ([TIED, HEAD], ())
    (entry,) = same.taken.account.harmless
    assert "byte for byte" in entry.why
    other = opened(llama(tmp_path / "other", {HEAD: table * 2}))
    assert (other.taken.facts.ties, other.taken.untied) == ({}, (HEAD,))
    assert other.taken.account.harmless == ()
    assert other.taken.account.parameters == same.taken.account.parameters + 1


def test_bytes_are_compared_to_the_last(tmp_path: Path) -> None:
    """In tiles: the tensors are larger than one."""
    a = np.zeros((1000, 300), np.float32)
    b = a.copy()
    b[-1, -1] = 1
    write_safetensors(tmp_path / SINGLE, {"a": a, "b": b, "c": a, "d": a.reshape(300, 1000), "e": a.view(np.int32)})
    tensors = read_checkpoint(tmp_path)
    assert [same_bytes(tensors["a"], tensors[name]) for name in "abcde"] == [True, False, True, False, False]


def test_a_layer_quantized_without_the_prefix_is_the_layer(tmp_path: Path) -> None:
    def strip(_config: dict[str, Any], tensors: dict[str, Array]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    whole_one = opened(whole_checkpoint("gptq-int4-g128-desc_act", tmp_path / "a")).taken
    stripped = opened(whole_checkpoint("gptq-int4-g128-desc_act", tmp_path / "b", strip)).taken
    assert set(stripped.tensors) == set(whole_one.tensors)
    assert stripped.layers[Q_PROJ].order == whole_one.layers[Q_PROJ].order  # type: ignore[union-attr]


def test_a_bias_that_the_model_has_not_must_be_zeros(tmp_path: Path) -> None:
    """Old writers add such."""

    def bias(value: float) -> Callable[[dict[str, Any], dict[str, Array]], None]:
        return lambda config, tensors: tensors.update({f"{DOWN_PROJ}.bias": np.full(256, value, np.float16)})

    without = opened(whole_checkpoint("gptq-int4-g128-sym", tmp_path / "a")).taken.account
    zeros = opened(whole_checkpoint("gptq-int4-g128-sym", tmp_path / "b", bias(0))).taken.account
    assert zeros.quantization == without.quantization + 1
    with pytest.raises(UserError, match="does not announce"):
        opened(whole_checkpoint("gptq-int4-g128-sym", tmp_path / "c", bias(1)))


FILES: dict[str, tuple[dict[str, Any], str, str]] = {
    # files beside model.safetensors -> (what is reported, the note of the first of them)
    "adapter": ({"adapter_config.json": {}}, "LoRA", ""),
    "adapter's weights": ({"adapter_model.bin": b""}, "LoRA", ""),
    "diffusers": ({"model_index.json": {}}, "diffusers", ""),
    "quanto": ({"quanto_qmap.json": {}}, "quanto", ""),
    "pickles": (
        {"pytorch_model-00001-of-00002.bin": b"", "pytorch_model-00002-of-00002.bin": b""},
        "",
        "another format",
    ),
    "GGUF": ({"model-Q4_K_M.gguf": b""}, "", "another format"),
    "the authors' format": ({"consolidated.00.safetensors": b""}, "", "authors"),
    "a variant": ({"model.fp16.safetensors": b""}, "", "variant"),
    "a stray shard": ({"model-00001-of-00002.safetensors": b"", INDEX: None}, "", "besides those"),
    "another index": ({"model.safetensors.index.fp16.json": {}}, "", "asked for by name"),
    "training": ({"training_args.bin": b"", "optimizer.pt": b""}, "", "training"),
    "a tokenizer": ({"tokenizer.json": {}, "tokenizer.model": b""}, "", "tokens"),
    "pictures": ({"preprocessor_config.json": {}}, "", "pictures"),
    "a checkpoint of the training": ({"checkpoint-5/model.safetensors": b""}, "", "another folder"),
    "hidden folders": ({".cache/model.safetensors": b""}, "", ""),
    "anything": ({"notes.md": b"", "assets.zip": b""}, "", ""),
}


@pytest.mark.parametrize("what", FILES)
def test_what_lies_beside_the_weights(what: str, tmp_path: Path) -> None:
    files, refused, note = FILES[what]
    write_safetensors(tmp_path / SINGLE, {"a": ONE})
    (tmp_path / "config.json").write_text("{}")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    errors: list[UserError] = []
    entries = account_of_files(tmp_path, errors.append)
    assert [e.name for e in entries if e.why == READ] == ["config.json", SINGLE]
    notes = [e for e in entries if e.why != READ]
    assert len(errors) == bool(refused)
    assert all(refused in e.what and e.fix for e in errors)
    assert bool(notes) == bool(note)
    assert all(note in e.why for e in notes)


@pytest.mark.parametrize(
    ("file", "method"),
    [("consolidated.safetensors", "authors"), ("weights.00.npz", "MLX"), ("a.nemo", "NeMo")],
)
def test_weights_that_are_alone_and_not_read_are_refused_by_name(file: str, method: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(UserError, match=method) as caught:
        opened(tmp_path)
    assert file in caught.value.what
    assert caught.value.fix


METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # method -> (fields of config.json, a file's content beside it)
    "bitsandbytes (nf4)": ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, {}),
    "fp8 (e4m3)": ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, {}),
    "modelopt (NVFP4)": ({}, {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}}),
    "modelopt": ({}, {"hf_quant_config.json": {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}}),
    "auto-round": ({}, {"quantization_config.json": {"quant_method": "auto-round", "bits": 4}}),
    "mlx": ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4, "group_size": 64}}, {}),
    "quark": ({"quantization_config": {"quant_method": "quark"}}, {}),
    "none named": ({"quantization_config": {"x": 1}}, {}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_without_a_reader_is_refused_by_its_name(method: str, tmp_path: Path) -> None:
    config, files = METHODS[method]
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match="cannot be read") as caught:
        announced_reader(tmp_path, config)
    assert caught.value.found == repr(method)


@pytest.mark.parametrize("said", [{}, {"producer": {}, "quantization": {"quant_algo": None, "exclude_modules": []}}])
def test_a_config_that_says_nothing_is_none(said: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    assert announced_reader(tmp_path, {"quantization_config": None}) is None


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", ["LlamaForCausalLM"]),
        ("llama", ["LLaMAForCausalLM"]),
        ("llama", []),
        ("llama", None),
        ("gpt2", ["GPT2LMHeadModel"]),
        ("gpt_bigcode", ["GPTBigCodeLMHeadModel"]),
        ("internlm3", ["InternLM3ForCausalLM"]),
        ("ctrl", ["CTRLLMHeadModel"]),
        ("gemma3_text", ["Gemma3ForCausalLM"]),
    ],
)
def test_names_of_causal_lms(model_type: str, names: list[str] | None) -> None:
    config = {"model_type": model_type, "architectures": names}
    assert head_of(config, "config.json", pooled=False) is CAUSAL_LM
    check_architectures(config, CAUSAL_LM, "config.json")


@pytest.mark.parametrize("names", ["LlamaForCausalLM", [1], [None], {"a": 1}])
def test_architectures_that_are_no_names_are_refused(names: Any) -> None:
    with pytest.raises(UserError, match="no list of names"):
        head_of({"model_type": "llama", "architectures": names}, "config.json", pooled=False)


@pytest.mark.parametrize(
    ("says", "named", "more"),
    [
        ("a model of pictures", "ViTForImageClassification", {}),
        ("a model of pictures", "DetrForObjectDetection", {}),
        ("a model of pictures", "ViTModel", {"image_size": 224}),
        ("a model of sound", "Wav2Vec2ForCTC", {"vocab_size": 32}),
        ("a model of sound", "WhisperForConditionalGeneration", {"num_mel_bins": 80, "is_encoder_decoder": True}),
        ("a model of pictures or sound beside text", "LlavaForConditionalGeneration", {"vision_config": {"a": 1}}),
        ("a model of an encoder and a decoder", "T5ForConditionalGeneration", {"is_encoder_decoder": True}),
        ("a part of a diffusers pipeline", "", {"_diffusers_version": "0.30"}),
    ],
)
def test_what_is_no_model_of_text_is_called_what_it_is(says: str, named: str, more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"this is {says}.*: InstantRT compiles no such checkpoint") as caught:
        head_of({"architectures": [named] if named else [], **more}, "config.json", pooled=False)
    assert "a causal language model, an encoder, or a classifier" in caught.value.expected


@pytest.mark.parametrize("named", ["LlamaForCausalLM", "BertModel", "GPT2LMHeadModel", "BertForMaskedLM"])
def test_a_model_of_text_may_have_patches(named: str) -> None:
    head_of({"architectures": [named], "patch_size": 4, "vocab_size": 9}, "config.json", pooled=False)


def test_a_folder_without_a_model_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "yolo.pt").touch()
    with pytest.raises(UserError, match=r"no model of Hugging Face is here\n.*\n  found:    yolo\.pt\n"):
        opened(tmp_path)


def test_the_own_code_of_a_model_names_its_class() -> None:
    own = {"model_type": "nosuch", "auto_map": {"AutoModelForCausalLM": "modeling.StrangeLM"}}
    check_architectures({**own, "architectures": ["StrangeLM"]}, CAUSAL_LM, "config.json")
    head = head_of({**own, "architectures": ["StrangeForSequenceClassification"]}, "config.json", pooled=False)
    assert head.task == "classify"
    with pytest.raises(UserError, match="compiles no checkpoint of type 'nosuch'"):  # it has no code for that
        check_architectures({**own, "architectures": ["StrangeForSequenceClassification"]}, head, "config.json")


def test_nothing_is_read_of_a_model_without_a_road(tmp_path: Path) -> None:
    """It is refused although its weights are no safetensors."""
    (tmp_path / SINGLE).write_bytes(b"nonsense")
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "model_type": "mixtral"}))
    with pytest.raises(UserError, match="a mixture of experts"):
        opened(tmp_path)


class Noted(Watch):
    """The notes of a plan."""

    notes: tuple[str, ...] = ()

    def planned(self, plan: Plan) -> None:
        self.notes = plan.notes


@pytest.mark.slow
def test_the_manifest_keeps_what_inspect_shows(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = llama(tmp_path / "model", {name: ONE})
    (folder / "pytorch_model.bin").write_bytes(b"")
    seen = Noted()
    compile_model(Request(folder, "x86", tmp_path / "out"), watch=seen)
    note = f"not used, and harmless: {name}, pytorch_model.bin; `instantrt inspect` says why"
    assert note in seen.notes
    (artifact,) = read_manifest(tmp_path / "out")
    shown = json.loads(invoke("inspect", folder, "--json").output)["account"]
    assert artifact.source["account"] == shown == json.loads(json.dumps(asdict(inspect(folder).account)))
    assert shown["harmless"] == [{"name": name, "count": 1, "why": "computed from config.json"}]
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_inspect_shows_a_folder_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "model_type": "mixtral"}))
    (tmp_path / "model_index.json").write_text("{}")
    shown = invoke("inspect", tmp_path)
    assert shown.exit_code == 1
    assert "mixture of experts" in shown.output
    assert "diffusers" in shown.output
    assert "2 problems" in shown.output


def test_inspect_prints_the_account() -> None:
    shown = invoke("inspect", TINY).output
    assert f"{len(read_checkpoint(TINY))} used by parameters, 0 by the quantization, 0 harmless" in shown
    assert "generation_config.json: not read: how to sample from the logits" in shown
    assert config_of(TINY)["architectures"] == ["Qwen2ForCausalLM"]


@pytest.mark.slow
def test_many_tensors_take_seconds(tmp_path: Path) -> None:
    model = build_skeleton(LLAMA, tmp_path, False)
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (8,) for i in range(200_000)}
    float32 = np.dtype(np.float32)
    stored = {name: FileTensor(tmp_path / SINGLE, 0, shape, float32, name) for name, shape in names.items()}
    errors: list[UserError] = []
    started = time.monotonic()
    facts = facts_of(model, llm_shape(model.config), stored)
    (entry,) = take_account(facts, pieces_of(stored, facts), None, (), errors.append).account.harmless
    assert time.monotonic() - started < 24  # seconds; a pass over all for each would take hours
    assert (entry.count, errors) == (200_000, [])
