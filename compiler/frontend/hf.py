"""Hugging Face causal LM -> FLOAT graph whose weights are references.

The model is built over storage that nobody touches and exported once; the parameters, graph inputs while the exporter
runs and folds, become lazy constants that point into the checkpoint. Exporting Qwen2-7B therefore needs neither its
15 GB nor its weights at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.checkpoint import INDEX, SINGLE, read_checkpoint, read_json
from instantrt.compiler.frontend.account import FLOATS, Taken, parameter_names, take_account
from instantrt.compiler.frontend.model import FloatModel, stored_types
from instantrt.compiler.frontend.side_files import Report, account_of_files
from instantrt.compiler.frontend.skeleton import build_skeleton, family, llm_shape
from instantrt.compiler.quant import plain
from instantrt.compiler.quant.readers import announced_reader
from instantrt.compiler.quant.stored import Reader
from instantrt.passes.core.errors import UserError, tried
from instantrt.passes.core.lazy import FileTensor, Missing, Source, View

ANOTHER_ROAD = "this model family has no road yet; an .onnx file that another tool exports of it may be compiled"


@dataclass(frozen=True)
class OpenCheckpoint:
    """A folder that was opened: its config, the model without storage, and what each tensor is for."""

    config: Mapping[str, Any]
    model: Any
    reader: Reader | None
    taken: Taken


def load_checkpoint(folder: Path, *, trust_remote_code: bool = False, max_length: int | None = None) -> FloatModel:
    """Reads `folder` (config.json, safetensors) and exports its graph, for sequences of at most `max_length` tokens.

    Inputs: input_ids [batch, sequence], attention_mask [batch, total], position_ids [batch, sequence] (int64),
    past_key_values.{i}.key|value [batch, kv_heads, past, head_dim] (float32), total = past + sequence.
    Outputs: logits [batch, sequence, vocab], present.{i}.key|value [batch, kv_heads, total, head_dim].
    """
    from instantrt.compiler.frontend.export import export_graph

    opened = open_checkpoint(folder, trust_remote_code=trust_remote_code, max_length=max_length)
    model, tensors = opened.model, opened.taken.tensors
    shape = llm_shape(model.config)
    aliases = {name: names for names in parameter_names(model) for name in names}
    with tried(f"exporting {family(opened.config)} to ONNX", where=str(folder), fix=ANOTHER_ROAD):
        exported = export_graph(model, shape)
    graph = exported.graph
    bind_weights(graph, aliases, tensors, folder)
    files = (*sorted(folder.glob("*config.json")), *dict.fromkeys(t.path for t in tensors.values()))
    account = opened.taken.account
    return FloatModel(
        graph=graph,
        folder=folder,
        config=opened.config,
        tensors=tensors,
        llm=shape,
        files=files,
        types=stored_types(graph),
        notes=(*exported.notes, *account.notes),
        head=head_path(model),
        account=asdict(account),
    )


def head_path(model: Any) -> str | None:
    """Where the language-model head lies, as the model's own class says."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)


def refuse(error: UserError) -> None:
    raise error


def open_checkpoint(
    folder: Path, *, trust_remote_code: bool = False, max_length: int | None = None, report: Report = refuse
) -> OpenCheckpoint:
    """Everything that is known before the export, in the order of what it costs.

    Files, the method of a quantization, the model's class, then headers and the account of their tensors. `report` is
    told what is wrong where more can be said afterwards.
    """
    files = account_of_files(folder, report)
    config = read_config(folder, trust_remote_code)
    reader = announced_reader(folder, config)
    model = build_skeleton(config, folder, trust_remote_code, max_length)
    stored = read_checkpoint(folder)
    reader = reader or plain.detect(stored)
    return OpenCheckpoint(config, model, reader, take_account(model, stored, reader, files, report))


def read_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if config.get("auto_map") and not trust_remote_code:
        raise UserError(
            "the model brings its own Python code",
            where=str(folder / "config.json"),
            found='"auto_map"',
            fix="read that code, then pass --trust-remote-code",
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
        if (
            isinstance(tensor, gs.Constant)
            and tensor.name.startswith("model.")
            and not isinstance(tensor._values, View)
        ):
            tensor.name = tensor.name.removeprefix("model.")
