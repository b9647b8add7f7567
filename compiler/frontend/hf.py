"""Hugging Face checkpoint -> FLOAT graph whose weights are references.

The model is built over storage that nobody touches and exported once; the parameters, graph inputs while the exporter
runs and folds, become lazy constants that point into the checkpoint. Exporting Qwen2-7B therefore needs neither its
15 GB nor its weights at all. What torch is asked, of a model's facts and of its graph, is kept (export_cache.py).
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.compiler.checkpoint import INDEX, SINGLE, read_checkpoint
from instantrt.compiler.frontend.account import Taken, attempt, take_account
from instantrt.compiler.frontend.adapter.apply import adapted
from instantrt.compiler.frontend.adapter.folder import Adapter, check_base
from instantrt.compiler.frontend.architecture import Head, head_of
from instantrt.compiler.frontend.export_cache import cache_folder, recall
from instantrt.compiler.frontend.facts import ModelFacts, facts_of
from instantrt.compiler.frontend.labels import label_names, labels_of
from instantrt.compiler.frontend.model import CLASSIFIERS, EncoderShape, FloatModel, LlmShape, stored_types
from instantrt.compiler.frontend.pieces import FLOATS, pieces_of
from instantrt.compiler.frontend.rope import check_length
from instantrt.compiler.frontend.sentence import SentencePipeline
from instantrt.compiler.frontend.sentence_files import files_of, read_pipeline, tensors_of
from instantrt.compiler.frontend.side_files import READ, Accounted, Report, account_of_files
from instantrt.compiler.frontend.skeleton import adapt, announced, build_skeleton, family, other_heads, shape_of
from instantrt.compiler.json_file import read_json
from instantrt.compiler.quant.readers import announced_reader, unannounced_reader
from instantrt.compiler.quant.stored import Reader
from instantrt.passes.core.collector import uncollected
from instantrt.passes.core.errors import UserError, tried
from instantrt.passes.core.lazy import FileTensor, Missing, Source, View, view_of

IMPORTING = "importing torch and transformers"
FEW = 8  # names of files in an error
UNLIMITED = 1 << 31  # transformers writes a number far above it where a tokenizer has no limit
ANOTHER_ROAD = "InstantRT cannot export this model; an .onnx file that another tool exports of it may be compiled"


@dataclass(frozen=True)
class OpenCheckpoint:
    """A folder that was opened: its config, and what each tensor is for.

    `root` is that folder, `folder` the language model's, which lies within where sentence-transformers wrote it.
    `skeleton` builds the model without storage, once; `kept` is where its export may be; `pipeline` is what follows it;
    `labels` are those of a classifier.
    """

    root: Path
    folder: Path
    config: Mapping[str, Any]
    reader: Reader | None
    taken: Taken
    skeleton: Callable[[], Any]
    kept: Path | None
    pipeline: SentencePipeline | None = None
    labels: Sequence[str] = ()


@uncollected()  # torch makes millions of objects, and drops hardly any
def load_checkpoint(opened: OpenCheckpoint, say: Callable[[str], None] = lambda text: None) -> FloatModel:
    """Exports the graph of a folder that was opened, or takes that of an earlier export.

    Inputs: input_ids [batch, sequence], attention_mask [batch, total], position_ids [batch, sequence] (int64),
    past_key_values.{i}.key|value [batch, kv_heads, past, head_dim] (float32), total = past + sequence.
    Outputs: logits [batch, sequence, vocab], present.{i}.key|value [batch, kv_heads, total, head_dim].

    A model without a cache has input_ids, attention_mask and, where it has kinds of tokens, token_type_ids, all
    [batch, sequence], and one output: sentence_embedding [batch, width], last_hidden_state [batch, sequence, width], or
    logits, of a classifier [batch, labels], of tokens [batch, sequence, labels or vocab].
    """
    folder, taken, tensors, shape = opened.folder, opened.taken, opened.taken.tensors, opened.taken.facts.shape
    exported = exported_model(opened, say)
    graph = gs.import_onnx(exported)
    bind_weights(graph, {name: names for names in taken.facts.groups for name in names}, tensors, folder)
    modules = files_of(opened.pipeline, opened.root) if opened.pipeline is not None else []
    files = (*sorted(folder.glob("*config.json")), *modules, *dict.fromkeys(t.path for t in tensors.values()))
    return FloatModel(
        graph=graph,
        folder=folder,
        config=opened.config,
        tensors=tensors,
        llm=shape if isinstance(shape, LlmShape) else None,
        files=files,
        types=stored_types(graph),
        notes=(*(p.value for p in exported.metadata_props), *taken.account.notes),
        head=taken.facts.head,
        account=asdict(taken.account),
        encoder=limited(shape, opened) if isinstance(shape, EncoderShape) else None,
        text=text_of(opened) if isinstance(shape, EncoderShape) else {},
        reader=opened.reader,
    )


def exported_model(opened: OpenCheckpoint, say: Callable[[str], None]) -> onnx.ModelProto:
    """The graph of a new export or of an earlier one; its metadata are what a user should know of how."""
    taken = opened.taken

    def export() -> bytes:
        if "transformers" not in sys.modules:  # what torch is asked was kept, and the graph was not
            say(IMPORTING)
            opened.skeleton()
        say(f"exporting {family(opened.config)}")
        from instantrt.compiler.frontend.export import export_graph

        model = opened.skeleton()
        with tried(f"exporting {family(opened.config)} to ONNX", where=str(opened.folder), fix=ANOTHER_ROAD):
            adapt(model, taken.untied, taken.buffers)
            made = export_graph(model, taken.facts.shape)
            onnx.helper.set_model_props(made.model, {f"note {i}": note for i, note in enumerate(made.notes)})
            return bytes(made.model.SerializeToString(deterministic=True))

    buffers = {
        name: [str(values.dtype), hashlib.sha256(values.tobytes()).hexdigest()]
        for name, values in taken.buffers.items()
    }
    about = {
        **{"graph of": announced(opened.config), "untied": taken.untied, "buffers": buffers},
        "shape": asdict(taken.facts.shape),
        "modules": opened.pipeline.about() if opened.pipeline is not None else [],
    }
    exported, earlier = recall(opened.kept, about, export, onnx.load_model_from_string)
    if earlier:
        say(f"taking the graph of an earlier export from {opened.kept}")
    return exported


def refuse(error: UserError) -> None:
    raise error


@uncollected()
def open_checkpoint(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    max_length: int | None = None,
    truncate_dim: int | None = None,
    report: Report = refuse,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    weights: Mapping[str, FileTensor] | None = None,
    adapter: Adapter | None = None,
    reads: Callable[[Iterable[Path]], None] = lambda files: None,
) -> OpenCheckpoint:
    """Everything that is known before the export, in the order of what it costs.

    Files, the method of a quantization, the model's class, then headers and the account of their tensors.

    max_length   tokens that no sequence will exceed
    report       is told what is wrong where more can be said afterwards
    cache        folder of earlier exports
    weights      the tensors, where the folder has none of its own
    adapter      is merged into them
    reads        is told the files of both, before torch is imported
    """
    pipeline = read_pipeline(folder, truncate_dim)
    root, folder = folder, pipeline.folder if pipeline is not None else folder
    own = {tensor.path.name: READ for tensor in weights.values()} if weights is not None else {}
    files = tuple(Accounted(name, 1, why) for name, why in own.items()) or account_of_files(folder, report)
    config = read_config(folder, trust_remote_code)
    reader = announced_reader(folder, config)
    head = head_of(config, str(folder / "config.json"), pooled=pipeline is not None)
    check_truncation(truncate_dim, pipeline, head, root)
    if head.task in CLASSIFIERS:
        label_names(config, str(folder / "config.json"))
    skeleton = functools.cache(partial(build_skeleton, config, folder, trust_remote_code, head, pipeline))
    try:
        stored = dict(weights if weights is not None else read_checkpoint(folder))
        stored |= tensors_of(pipeline, root) if pipeline is not None else {}
    except UserError:
        skeleton()  # what is wrong with the model itself is said first
        raise
    reads([*dict.fromkeys(t.path for t in stored.values()), *(adapter.files if adapter is not None else ())])
    # Code that a model brings is no part of a key.
    kept = None if config.get("auto_map") else cache_folder(cache)
    # Renaming goes by the order of the names: docs/facts.md, "Tied weights that differ".
    about = {
        "facts of": announced(config),
        "tensors": list(stored),
        "head": head.task,
        "modules": [pipeline.about(), pipeline.max_length] if pipeline is not None else [],
    }

    def facts_now() -> bytes:
        say(IMPORTING)
        model = skeleton()
        beside = other_heads(model, config) if head.auto == "AutoModel" else []
        return facts_of(model, shape_of(model, head, pipeline), stored, beside).to_json()

    facts, _ = recall(kept, about, facts_now, ModelFacts.from_json)
    check_length(facts.switches, max_length, folder / "config.json")
    reader = reader or unannounced_reader(stored)
    pieces = pieces_of(stored, facts)
    if adapter is not None:
        check_base(reader, root, adapter)
        pieces, files = adapted(pieces, facts, adapter, report), (*files, *adapter.account(report))
    labels: Sequence[str] = ()
    if isinstance(facts.shape, EncoderShape) and head.task in CLASSIFIERS:
        labels = attempt(report, labels_of, config, facts.shape.width, str(folder / "config.json")) or ()
    taken = take_account(facts, pieces, reader, files, report)
    return OpenCheckpoint(root, folder, config, reader, taken, skeleton, kept, pipeline, labels)


def check_truncation(width: int | None, pipeline: SentencePipeline | None, head: Head, folder: Path) -> None:
    if width is not None and pipeline is None:
        raise UserError(
            "truncate_dim is for a model of sentence embeddings",
            where=str(folder),
            expected="a folder with modules.json of sentence-transformers",
            found=f"a model to {head.task}",
            fix="leave it out",
        )


def limited(shape: EncoderShape, opened: OpenCheckpoint) -> EncoderShape:
    """With the length at which the tokenizer's config cuts texts, where nothing else says it."""
    if opened.pipeline is not None and opened.pipeline.max_length:
        return shape
    path = opened.folder / "tokenizer_config.json"
    said = read_json(path).get("model_max_length") if path.is_file() else None
    if type(said) is not int or not 0 < said < UNLIMITED:
        return shape
    return replace(shape, max_length=min(said, shape.max_length or said))


def text_of(opened: OpenCheckpoint) -> dict[str, Any]:
    """How texts are prepared, and what the labels are called."""
    texts = opened.pipeline or SentencePipeline(opened.folder, ())
    return {
        "labels": list(opened.labels),
        "lowercase": texts.lowercase,
        "prompts": dict(texts.prompts),
        "default_prompt": texts.default_prompt,
    }


def read_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    if folder.is_dir() and not os.path.lexists(folder / "config.json"):
        raise UserError(
            "no model of Hugging Face is here",
            where=str(folder),
            expected="config.json and *.safetensors",
            found=", ".join(sorted(path.name for path in folder.iterdir())[:FEW]) or "nothing",
            fix="name the folder that has them, a .gguf file, or an .onnx file",
        )
    config: dict[str, Any] = read_json(folder / "config.json")
    if config.get("auto_map") and not trust_remote_code:
        raise UserError(
            "the model brings its own Python code",
            where=str(folder / "config.json"),
            found='"auto_map"',
            fix="read that code, then pass --trust-remote-code; or remove the key if transformers knows the model",
        )
    if (named := config.get("transformers_weights")) is not None:
        raise UserError(
            "config.json names the file of its weights",
            where=str(folder / "config.json"),
            found=f'"transformers_weights": {named!r}',
            fix=f"rename that file to {SINGLE} (or its index to {INDEX}), and remove the key",
        )
    return config


def bind_weights(
    graph: gs.Graph, aliases: Mapping[str, list[str]], tensors: Mapping[str, FileTensor], folder: Path
) -> None:
    """Turns parameter inputs into lazy constants named as in the checkpoint, and buffers into in-memory ones."""
    for tensor in [t for t in graph.inputs if t.name.startswith("model.")]:
        graph.inputs.remove(tensor)
        names = aliases[tensor.name.removeprefix("model.")]
        stored = next((tensors[name] for name in names if name in tensors), None)
        shape = tuple(int(d) for d in tensor.shape)
        source: Source = stored if stored is not None else Missing(names[0], str(folder))
        if stored is not None and stored.dtype not in FLOATS:
            source = Missing(stored.name, str(stored.path), found=str(stored.dtype))
        tensor.name = stored.name if stored is not None else names[0]
        tensor.to_constant(View(source, shape, np.float32))
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and tensor.name.startswith("model.") and view_of(tensor) is None:
            tensor.name = tensor.name.removeprefix("model.")
