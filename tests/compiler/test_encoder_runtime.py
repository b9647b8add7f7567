"""Embedder and Classifier on real artifacts of tiny models: each text is what it is alone, whatever lies beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantrt import LLM, Classifier, Embedder
from instantrt.compiler.artifact.digest import sha256
from instantrt.compiler.encoder import listed
from instantrt.compiler.serving.runtime.texts import PADDING, TextReader
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array
from tests.commands import invoke
from tests.compiler.encoder_models import LONGEST

TEXTS = ["a", "The boat is late again.", "fish", "An old net lies on the quay, and nobody mends it."]


def ids_of(text: str) -> list[int]:
    """As the tokenizer of the tests has it: a token a letter, one before and one behind; "~" is no word of it."""
    return [0, *(ord(letter) - 20 if letter != "~" else 3 for letter in text), 2]


@pytest.mark.parametrize("texts", [5, None, b"a", [b"a"], ["a", 5], [[]], [("a", 5)], [("a", "b", "c")], {"a": 1}])
def test_what_is_no_text_is_refused(texts: Any) -> None:
    with pytest.raises(UserError, match="this is no text"):
        listed(texts)
    assert listed(("a", ("b", "c"))) == ["a", ("b", "c")]


def test_each_vector_is_that_of_its_text_alone(embedding: Path) -> None:
    """In the order given, in small letters, cut where the folder says, whatever the file had for a training."""
    with Embedder(embedding) as model:
        got = model.encode(TEXTS, batch_size=3)
        assert got.shape == (4, model.width)
        for text, vector in zip(TEXTS, got, strict=True):
            alone = model.encode(text)
            assert alone.shape == (32,)
            assert np.abs(alone - vector).max() < 1e-5
            ids = np.array([ids_of(text.lower())])
            ids = np.concatenate([ids[:, : LONGEST - 1], ids[:, -1:]], axis=1) if ids.shape[1] > LONGEST else ids
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            (want,) = model.session.run(None, feeds)
            assert np.abs(vector - want[0]).max() < 1e-5
        assert model.encode([]).shape == (0, 32)


def test_texts_of_similar_length_run_together(embedding: Path) -> None:
    """All of them once, the longest first; no more than asked for, no padding beyond what another run costs."""
    texts = ["fish" * (index % 9) for index in range(40)] + ["b" * length for length in (90, 74, 73)]
    reader = TextReader(embedding / "x86", {"max_length": 0, "lowercase": False})
    rows = reader.rows(texts)
    parts = [(part, feeds["attention_mask"].sum(axis=1)) for part, feeds in reader.batches(rows, 7)]
    assert sorted(index for part, _ in parts for index in part) == list(range(43))
    lengths = [length for _, counts in parts for length in counts]
    assert lengths == sorted((len(row.ids) for row in rows), reverse=True)
    assert max(len(part) for part, _ in parts) == 7
    assert max(counts[0] - counts[-1] for _, counts in parts) == PADDING
    assert [len(part) for part, _ in parts[:2]] == [2, 1]


def test_prompts(embedding: Path) -> None:
    with Embedder(embedding) as model:
        assert (model.encode("fish", prompt_name="query") == model.encode("find fish")).all()
        assert (model.encode("fish") != model.encode("find fish")).any()
        with pytest.raises(UserError, match="prompt_name: expected one of query, found passage"):
            model.encode("fish", prompt_name="passage")
        model.reader.about = {**model.reader.about, "prompts": {}, "default_prompt": ""}
        with pytest.raises(UserError, match="expected none: this model has no prompts, found query"):
            model.encode("fish", prompt_name="query")


def test_a_classifier_says_its_labels(classes: Path) -> None:
    with Classifier(classes) as model:
        found = model.classify([*TEXTS, ("a boat", "a net")])
        assert [set(each) for each in found] == [{"bad", "fair", "good"}] * 5
        assert found[0] == pytest.approx(model.classify(TEXTS[0]), abs=1e-6)
        for each in found:
            assert list(each.values()) == sorted(each.values(), reverse=True)
            assert sum(each.values()) == pytest.approx(1, abs=1e-6)
        assert found[4] != model.classify("a boat")


IDENTITY = "torch.nn.modules.linear.Identity"
SCORES: dict[str, tuple[dict[str, Any], Callable[[Array], Array]]] = {
    "labels that do not exclude one another": (
        {"problem_type": "multi_label_classification"},
        lambda logits: 1 / (1 + np.exp(-logits)),
    ),
    "numbers": ({"problem_type": "regression"}, lambda logits: logits),
    "a reranker's logits": ({"sentence_transformers": {"activation_fn": IDENTITY}}, lambda logits: logits),
    "those of an older one": ({"sbert_ce_default_activation_function": IDENTITY}, lambda logits: logits),
}


@pytest.mark.parametrize("what", SCORES)
def test_scores_are_what_the_config_says(what: str, classes: Path, tmp_path: Path) -> None:
    said, scored = SCORES[what]
    shutil.copytree(classes, tmp_path / "out")
    changed(tmp_path / "out", "config.json", said)
    with Classifier(tmp_path / "out") as model:
        (feeds,) = (feeds for _, feeds in model.reader.batches(model.reader.rows(["fish"]), 1))
        want = scored(model.session.run(None, feeds)[0][0])
        found = model.classify("fish")
    assert [found[label] for label in ("bad", "fair", "good")] == pytest.approx(want, rel=1e-5)


def changed(out: Path, name: str, fields: dict[str, Any]) -> None:
    """More fields in a side file, whose digest the manifest then has."""
    path = out / "x86" / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | fields))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["artifacts"][0]["digests"][f"x86/{name}"] = sha256(path)
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_kinds_of_tokens_are_those_that_the_tokenizer_gave_a_training(embedding: Path, tmp_path: Path) -> None:
    """None, where its config names no token_type_ids: all are of the first kind."""
    pair = ("a boat", "a net")
    kinds = []
    generic = [{"tokenizer_class": name} for name in ("PreTrainedTokenizerFast", "PreTrainedTokenizer")]
    for index, said in enumerate(({}, {"model_input_names": ["input_ids"]}, *generic)):
        shutil.copytree(embedding, tmp_path / str(index))
        changed(tmp_path / str(index), "tokenizer_config.json", said)
        with Embedder(tmp_path / str(index)) as model:
            kinds.append(model.reader.feeds(model.reader.rows([pair]))["token_type_ids"].max())
    assert kinds == [1, 0, 0, 0]


def test_texts_are_padded_with_what_the_model_knows_as_padding(embedding: Path, tmp_path: Path) -> None:
    """A classifier that reads to the last token finds it by the config's number, whatever the tokenizer's is."""
    pads = []
    for index, fields in enumerate(({"pad_token_id": 1}, {"pad_token_id": None}, {"pad_token_id": -1})):
        folder = tmp_path / str(index)
        shutil.copytree(embedding, folder)
        changed(folder, "config.json", fields)
        changed(folder, "tokenizer_config.json", {"pad_token": "</s>"})
        with Embedder(folder) as model:
            pads.append(model.reader.feeds(model.reader.rows(["ab", "a"]))["input_ids"][1, -1])
    assert pads == [1, 2, 2]


@pytest.mark.parametrize("kind", [Embedder, Classifier, LLM])
def test_a_model_for_something_else_is_refused_by_name(
    kind: Any, embedding: Path, classes: Path, tiny_compiled: Path
) -> None:
    ways = {
        Embedder: {classes: "use Classifier", tiny_compiled: "use LLM"},
        Classifier: {embedding: "use Embedder", tiny_compiled: "use LLM"},
        LLM: {embedding: "Embedder", classes: "Classifier"},
    }
    for folder, way in ways[kind].items():
        with pytest.raises(UserError) as caught:
            kind(folder)
        assert way in f"{caught.value.fix} {caught.value.found}"


def test_a_changed_file_is_refused(embedding: Path, tmp_path: Path) -> None:
    shutil.copytree(embedding, tmp_path / "out")
    data = next((tmp_path / "out/x86").glob("model.onnx?*"), tmp_path / "out/x86/model.onnx")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match=r"changed|not what"):
        Embedder(tmp_path / "out")


def test_the_commands(embedding: Path, classes: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("fish\n\n" + "\n".join(f"boat {index}" for index in range(300)))
    said = invoke("embed", embedding, "--file", tmp_path / "texts.txt", "--out", tmp_path / "v.npy")
    assert said.exit_code == 0
    assert "302 vectors of 32 numbers" in said.output
    vectors = np.load(tmp_path / "v.npy")
    with Embedder(embedding) as model:
        assert np.abs(vectors[[0, 301]] - model.encode(["fish", "boat 299"])).max() < 1e-5
    table = invoke("embed", embedding, "--text", "fish", "--text", "fish").output
    assert "1.00 " in table
    for refused, words in ((("--file", tmp_path / "texts.txt"), "many texts"), ((), "no text")):
        assert words in str(invoke("embed", embedding, *refused).exception)
    labels = invoke("classify", classes, "--text", "fish").output
    assert all(label in labels for label in ("bad", "fair", "good"))
