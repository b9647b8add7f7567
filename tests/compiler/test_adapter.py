"""LoRA adapters: merged as peft merges them, over every kind of module, and refused by name where they cannot be."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from instantrt.compiler.accuracy.runners import session, transformers_runner
from instantrt.compiler.accuracy.subjects import request_of
from instantrt.compiler.artifact.manifest import read_manifest
from instantrt.compiler.compile import compile_model
from instantrt.compiler.frontend import hf, load
from instantrt.compiler.frontend.adapter.folder import open_adapter
from instantrt.compiler.frontend.gguf.folder import made_folder
from instantrt.compiler.inspect import inspect
from instantrt.compiler.request import Request
from instantrt.passes.core import lazy
from instantrt.passes.core.errors import MissingExtra, UserError
from instantrt.passes.core.lazy import BFLOAT16, Array, FileTensor, Transposed, whole
from instantrt.tools.bench.synthetic import write_safetensors
from tests.checkpoints import whole_checkpoint
from tests.commands import refused
from tests.compiler.encoder_models import make as encoder
from tests.conftest import TINY
from tests.gguf_files import llama as gguf_llama
from tests.models import FAMILIES, SIZES

CLOSE = 1e-6  # of the largest weight: peft sums in float32, in an order of its own
MORE = {"gpt2": {"num_key_value_heads": 4, "n_inner": 96}}


def base_of(family: str, folder: Path, **fields: Any) -> Path:
    """A tiny random model in bfloat16: float32 sums of it are none of its numbers."""
    torch.manual_seed(0)
    given = {"model_type": family, **SIZES, **FAMILIES.get(family, MORE.get(family, {})), **fields}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(given.pop("model_type"), **given))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """qwen2 is tied and has biases, llama has neither, gpt2 holds its matrices as [K, N]."""
    root = tmp_path_factory.mktemp("bases")
    return {family: base_of(family, root / family) for family in ("qwen2", "llama", "gpt2")}


def loaded(base: Path, auto: str = "AutoModelForCausalLM") -> Any:
    return getattr(transformers, auto).from_pretrained(base, dtype=torch.float32)


def trained(base: Path, folder: Path, auto: str = "AutoModelForCausalLM", **fields: Any) -> Path:
    """An adapter over `base`, saved in `folder`, every tensor that a training would change random."""
    lora = get_peft_model(loaded(base, auto), LoraConfig(**{"r": 4, "lora_alpha": 6, **fields}))
    torch.manual_seed(1)
    for name, parameter in lora.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 1.0 if "magnitude" in name else 0.0, 0.1)
    lora.save_pretrained(folder)
    return folder


def tensors_of(base: Path, adapter: Path) -> Mapping[str, FileTensor]:
    return hf.open_checkpoint(base, adapter=open_adapter(adapter)).taken.tensors


QV = ["q_proj", "v_proj"]
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "two modules": ("qwen2", {"target_modules": QV}),
    "all linears": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "a pattern": ("qwen2", {"target_modules": r".*layers\.1\..*(q|up)_proj", "exclude_modules": ["up_proj"]}),
    "layers": ("qwen2", {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "ranks and alphas": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.down_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 1.5},
        },
    ),
    "DoRA": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "all biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of its modules": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "a bias of B": ("qwen2", {"target_modules": QV, "lora_bias": True}),
    "a norm and the table": ("qwen2", {"target_modules": QV, "modules_to_save": ["norm", "embed_tokens"]}),
    "a head": ("qwen2", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "the table": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "DoRA of the table": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "[K, N]": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "DoRA of [K, N]": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
}


@pytest.mark.parametrize("what", MERGES)
def test_merged_as_peft_merges(
    what: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy, "TILE_BYTES", 1 << 11)  # of 16 rows and fewer
    family, fields = MERGES[what]
    base, folder = bases[family], trained(bases[family], tmp_path, **fields)
    want = PeftModel.from_pretrained(loaded(base), folder).merge_and_unload().state_dict()
    found, before = tensors_of(base, folder), hf.open_checkpoint(base).taken.tensors
    changed = 0
    for name, tensor in found.items():
        values = whole(tensor).astype(np.float32)
        np.testing.assert_allclose(values, want[name], rtol=0, atol=CLOSE * np.abs(want[name].numpy()).max())
        changed += name not in before or not np.array_equal(values, whole(before[name]).astype(np.float32))
    assert changed


def test_a_classifier(tmp_path: Path) -> None:
    """peft brings its head, by both of the names that heads have; what follows a sentence's model is the base's."""
    encoder(family := "bert", auto := "AutoModelForSequenceClassification", tmp_path)
    adapter = trained(tmp_path, tmp_path / family, auto=auto, task_type="SEQ_CLS", target_modules=["query"])
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    want = PeftModel.from_pretrained(loaded(tmp_path, auto), adapter).merge_and_unload().state_dict()
    for name, tensor in tensors_of(tmp_path, adapter).items():
        np.testing.assert_allclose(whole(tensor), want[name], rtol=0, atol=CLOSE * np.abs(want[name].numpy()).max())
    (adapter / "modules.json").write_text("[]")
    with pytest.raises(UserError, match=r"brings modules\.json"):
        tensors_of(tmp_path, adapter)


def test_columns_are_those_of_the_rows(bases: dict[str, Path], tmp_path: Path) -> None:
    """A matrix that is stored as [K, N] is quantized by its columns."""
    found = tensors_of(bases["gpt2"], trained(bases["gpt2"], tmp_path, target_modules=["c_attn"], use_dora=True))
    tensor = found["transformer.h.0.attn.c_attn.weight"]
    np.testing.assert_array_equal(tensor.columns(5, 9), whole(tensor)[:, 5:9])
    columns = np.concatenate([tile.parts[0] for tile in Transposed(tensor).tiles()])
    np.testing.assert_array_equal(columns.T, whole(tensor))


TIED: dict[str, dict[str, Any]] = {
    "table": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "tied adapters": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "a copy of the table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("what", TIED)
def test_what_an_adapter_unties_computes_what_was_trained(what: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """peft's merge adds to both what was trained on one, so its model is run as it is: unmerged."""
    base = bases["qwen2"]
    folder, ids = trained(base, tmp_path, **TIED[what]), torch.arange(3, 19)[None]
    found = {name: torch.tensor(whole(t).astype(np.float32)) for name, t in tensors_of(base, folder).items()}
    assert "lm_head.weight" in found
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, tie_word_embeddings=False)
    model.load_state_dict(found)
    with torch.inference_mode():
        want = PeftModel.from_pretrained(loaded(base), folder).eval()(input_ids=ids).logits
        np.testing.assert_allclose(model.eval()(input_ids=ids).logits, want, atol=3e-6 * want.abs().max())


def test_the_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifact, manifest, tokenizer and the transformers form of a folder that is an adapter itself."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    shutil.copytree(TINY, base)
    trained(base, lora, target_modules=["q_proj", "down_proj"])
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "../base"}))
    (lora / "chat_template.jinja").write_text("brought")
    compile_model(Request(lora, ("x86",), tmp_path / "out", logits="all", smoke=False))
    (artifact,) = read_manifest(tmp_path / "out")
    files = artifact.source["files"]
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors", "config.json"} <= set(files)
    assert (tmp_path / "out" / "x86" / "chat_template.jinja").read_text() == "brought"
    assert (tmp_path / "out" / "x86" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    assert {"name": "lora/adapter_model.safetensors", "count": 1, "why": "merged into the model"} in artifact.source[
        "account"
    ]["files"]

    with pytest.raises(UserError, match="was made with an adapter"):
        request_of(tmp_path / "out", base, None)
    assert request_of(tmp_path / "out", base, None, adapter=[lora])[0].adapter == (lora,)

    model = load(lora)
    assert set(model.types) == {BFLOAT16}  # what an engine computes in goes by the base
    assert "the adapter lora is merged into base; the tokenizer's files are the adapter's" in model.notes[0]
    ids = np.arange(5, 25)[None]
    feeds: dict[str, Array] = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids - 5}
    want = transformers_runner(model.folder, model.adapter)(feeds)["logits"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "peft", None)
        with pytest.raises(MissingExtra, match="needs peft"):
            transformers_runner(model.folder, model.adapter)
    empty = {n: np.zeros((1, 2, 0, 64), np.float32) for n in model.llm.cache_names("past_key_values")}  # type: ignore[union-attr]
    onnx = session(tmp_path / "out" / artifact.path)
    given = {t.name: value for t in onnx.get_inputs() if (value := {**feeds, **empty}.get(t.name)) is not None}
    np.testing.assert_allclose(onnx.run(["logits"], given)[0], want, atol=2e-5 * np.abs(want).max())
    assert np.abs(transformers_runner(base)(feeds)["logits"] - want).max() > 0.01 * np.abs(want).max()


@pytest.fixture
def pair(bases: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter over it, for a test to change."""
    return bases["qwen2"], trained(
        bases["qwen2"], tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["norm"]
    )


def said(**fields: Any) -> Callable[[Path], None]:
    """A change of keys in the config of an adapter's folder."""

    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")
NORM = "base_model.model.model.norm.weight"


def holding(**arrays: Array | None) -> Callable[[Path], None]:
    """A change of tensors: `A`, `B`, `NORM` or a name with `__` for its points; None takes one away."""

    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = {name: np.array(array) for name, array in load_file(file).items()}
        for key, array in arrays.items():
            name = {"A": A, "B": B, "NORM": NORM}.get(key, key.replace("__", "."))
            tensors.pop(name, None)
            tensors |= {} if array is None else {name: array}
        write_safetensors(file, tensors)

    return change


def lost(name: str, instead: str = "") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        if instead:
            (folder / instead).write_bytes(b"")

    return change


def empty(folder: Path) -> None:
    said(target_modules=None, modules_to_save=None)(folder)
    write_safetensors(folder / "adapter_model.safetensors", {})


def deeper(folder: Path) -> None:
    """As peft saves several adapters of a model."""
    (folder / "default").mkdir()
    for file in [*folder.glob("adapter_*")]:
        file.rename(folder / "default" / file.name)


ONES = np.ones((4, 64), np.float32)
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another method": (said(peft_type="IA3"), "peft_type.*'IA3'"),
    "no method": (said(peft_type=None), "peft_type"),
    "alpha NaN": (said(lora_alpha=float("nan")), "lora_alpha.*a finite number.*nan"),
    "alpha beyond all": (said(lora_alpha=10**400), "lora_alpha"),
    "alpha a text": (said(alpha_pattern={"q_proj": "8"}), "alpha_pattern"),
    "r true": (said(r=True), "r of the adapter"),
    "r 0": (said(rank_pattern={"q_proj": 0}), "rank_pattern"),
    "a huge r": (said(r=1 << 30), r"has another shape.*rank 1073741824.*\[4, 64\]"),
    "r beyond all": (said(r=10**400), "r of the adapter"),
    "targets of numbers": (said(target_modules=[1]), "target_modules"),
    "no regular expression": (said(target_modules="(q_proj"), "no regular expression"),
    "another library's": (said(target_modules="(?e)(q_proj){e<=1}"), "no regular expression"),
    "a pattern that re never ends": (said(target_modules="(.+)+[A-C]"), "targets no module"),
    "one without end": (said(rank_pattern={"(.*)" * 12 + r"\12\11[A-C]": 2}), "takes for ever"),
    "a target without tensors": (said(target_modules=["q_proj", "k_proj"]), "has no tensors of model.layers.0.*k_proj"),
    "tensors without a target": (
        said(target_modules="model.layers.0.self_attn.q_proj"),
        "has LoRA tensors of .*layers.1",
    ),
    "nothing at all": (empty, "targets no module"),
    "no target": (said(target_modules=["query"]), "targets no module"),
    "PiSSA": (said(init_lora_weights="pissa_niter_4"), "changed its base's weights.*path_initial_model"),
    "tokens": (said(trainable_token_indices=[1]), "trainable_token_indices of the adapter is not supported"),
    "parameters": (said(target_parameters=["x"]), "target_parameters"),
    "an unknown key": (said(quantum={"a": 1}), "quantum of the adapter is not supported: nobody here knows"),
    "DoRA without magnitudes": (said(use_dora=True), "is not whole.*lora_magnitude_vector"),
    "biases that are not there": (said(bias="all"), "has no tensor model.layers.0.self_attn.q_proj.bias"),
    "a module that is not there": (said(modules_to_save=["norm", "lm_head"]), "has no tensor lm_head.weight"),
    "no B": (holding(B=None), "is not whole"),
    "another A": (
        holding(A=ONES[:, :32]),
        r"lora_A.weight of the adapter has another shape: .*another base.*\[4, 32\]",
    ),
    "A of three dimensions": (holding(A=ONES[None]), "has another shape"),
    "A of integers": (holding(A=ONES.astype(np.int32)), "is not a float tensor"),
    "a vocabulary": (
        holding(base_model__model__lm_head__weight=np.ones((170, 64), np.float32)),
        "vocabulary was resized",
    ),
    "two of a name": (holding(model__norm__weight=np.ones(64, np.float32)), "nothing in the base takes tensor"),
    "another norm": (holding(NORM=np.ones(32, np.float32)), "another shape: the adapter is for another base"),
    "a name": (holding(base_model__model__score__weight=ONES), "nothing in the base takes tensor .*score.weight"),
    "a pickle": (lost("adapter_model.safetensors", "adapter_model.bin"), "no adapter_model.safetensors.*pickles"),
    "no config": (lost("adapter_config.json"), "no adapter here"),
    "several in one folder": (deeper, "no adapter here.*lora/default.*name one of these"),
    "a cut file": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"),
        "not a readable safetensors",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str, pair: tuple[Path, Path]) -> None:
    """By an inspection, too, in the same words."""
    base, adapter = pair
    change, words = REFUSED[what]
    change(adapter)
    with pytest.raises(UserError, match=f"(?s){words}") as caught:
        tensors_of(base, adapter)
    assert inspect(base, adapter=[adapter]).problems[0].what == caught.value.what


@pytest.mark.parametrize(("tensor", "value"), [("A", np.nan), ("B", np.inf)])
def test_numbers_that_are_none(tensor: str, value: float, pair: tuple[Path, Path]) -> None:
    """They are found where weights are read: nothing is written."""
    base, adapter = pair
    holding(**{tensor: np.full((4, 64) if tensor == "A" else (64, 4), value, np.float32)})(adapter)
    with pytest.raises(UserError, match=r"q_proj\.weight with its adapter is not finite"):
        whole(tensors_of(base, adapter)["model.layers.0.self_attn.q_proj.weight"])


def test_over_what_is_quantized(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = pair[1]
    for name in ("gptq-int4-g128-sym", "awq-int4-g128", "ct-w8a16"):
        with pytest.raises(UserError, match=r"(?s)quantized \(.*over the float model"):
            tensors_of(whole_checkpoint(name, tmp_path / name), adapter)
    weights = gguf_llama(tmp_path / "m.gguf")
    with pytest.raises(UserError, match=r"(?s)quantized \(gguf\).*--requantize"):
        load(tmp_path / "m.gguf", adapter=[adapter])
    write_safetensors(adapter / "adapter_model.safetensors", lora := dict(of_shapes(weights)))
    said(target_modules=["q_proj"], modules_to_save=None)(adapter)
    made = made_folder(tmp_path / "m.gguf", requantize=True)
    found = hf.open_checkpoint(made.path, weights=made.weights, adapter=open_adapter(adapter)).taken.tensors
    for name, array in weights.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        more = 1.5 * lora[f"{path}.lora_B.weight"] @ lora[f"{path}.lora_A.weight"] if "q_proj" in name else 0
        np.testing.assert_allclose(whole(found[name]), array + more, rtol=0, atol=CLOSE * np.abs(array).max())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_bytes((TINY / name).read_bytes())
    (adapter / "added_tokens.json").write_text('{"<new>": 4096}')
    loaded = load(tmp_path / "m.gguf", requantize=True, adapter=[adapter])
    assert 'tokenizer.json lacks tokens that other files name: "<new>"' in loaded.notes[-1]


def of_shapes(weights: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """A LoRA of rank 4 of every q_proj."""
    rng = np.random.default_rng(0)
    for name, array in weights.items():
        if name.endswith("q_proj.weight"):
            path, (n, k) = f"base_model.model.{name.removesuffix('.weight')}", array.shape
            yield f"{path}.lora_A.weight", rng.normal(0, 0.1, (4, k)).astype(np.float32)
            yield f"{path}.lora_B.weight", rng.normal(0, 0.1, (n, 4)).astype(np.float32)


def test_all_linears_but_the_head(bases: dict[str, Path], tmp_path: Path) -> None:
    """peft writes their names; a config may say it in a word."""
    adapter = trained(bases["llama"], tmp_path, target_modules="all-linear")
    said(target_modules="All-Linear")(adapter)
    assert type(tensors_of(bases["llama"], adapter)["lm_head.weight"]) is FileTensor


def test_which_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    found = inspect(adapter)  # the config names the folder of the base
    assert (found.model, found.problems) == ("lora", ())
    assert {layer.stored for layer in found.layers if "q_proj" in layer.path} == {
        "bfloat16 and a LoRA of rank 4, in float32"
    }
    for strange in ("x" * 5000, "a\0b", ""):
        said(base_model_name_or_path=strange)(adapter)
        with pytest.raises(UserError, match="base of the adapter is not here"):
            load(adapter)
    with pytest.raises(UserError, match="goes over a checkpoint's folder"):
        load(tmp_path / "m.onnx", adapter=[adapter])
    said(base_model_name_or_path="Qwen/Qwen2-0.5B")(adapter)
    with pytest.raises(UserError, match=r"(?s)base of the adapter is not here.*'Qwen/Qwen2-0.5B'.*--base FOLDER"):
        load(adapter)
    assert "it names Qwen/Qwen2-0.5B as its base" in inspect(adapter, base=base).notes[0]
    other = shutil.copytree(adapter, tmp_path / "other")
    compiling = ["compile", base, "--target", "x86", "-o", tmp_path / "out"]
    assert "several adapters" in refused(*compiling, "--adapter", adapter, "--adapter", other).what
    assert "several adapters" in refused("compile", adapter, *compiling[2:], "--adapter", other).what
    assert "an adapter over an adapter" in refused("compile", adapter, *compiling[2:], "--base", other).what
    assert "base is for a model" in refused(*compiling, "--adapter", adapter, "--base", base).what
    assert not (tmp_path / "out").exists()
