"""Hugging Face causal LM -> FLOAT graph whose weights are references.

The model is built over storage that nobody touches and exported once; the parameters, graph inputs while the exporter
runs and folds, become lazy constants that point into the checkpoint. Exporting Qwen2-7B therefore needs neither its
15 GB nor its weights at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.checkpoint import INDEX, SINGLE, read_checkpoint, read_json
from instantrt.compiler.frontend.account import FLOATS, Taken, parameter_names, take_account
from instantrt.compiler.frontend.architecture import (
    ONNX,
    check_architectures,
    check_family,
    check_layers,
    check_modules,
    refusal,
)
from instantrt.compiler.frontend.model import OPSET, FloatModel, LlmShape, stored_types
from instantrt.compiler.frontend.rope import check_rope, keep_first_table
from instantrt.compiler.frontend.side_files import Report, account_of_files
from instantrt.compiler.quant import plain
from instantrt.compiler.quant.readers import announced_reader
from instantrt.compiler.quant.stored import Reader
from instantrt.passes.core.errors import FOUND, UserError, require, tried
from instantrt.passes.core.lazy import FileTensor, Missing, Source, View

if TYPE_CHECKING:
    import torch

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
    opened = open_checkpoint(folder, trust_remote_code=trust_remote_code, max_length=max_length)
    model, tensors = opened.model, opened.taken.tensors
    shape = llm_shape(model.config)
    aliases = {name: names for names in parameter_names(model) for name in names}
    with tried(f"exporting {family(opened.config)} to ONNX", where=str(folder), fix=ANOTHER_ROAD):
        graph = export_graph(model, shape)
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
        notes=account.notes,
        head=head_path(model),
        account=asdict(account),
    )


def head_path(model: Any) -> str | None:
    """Where the language-model head lies, as the model's own class says."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)


def family(config: Mapping[str, Any]) -> str:
    """What its users call a model: `LlamaForCausalLM (llama)`."""
    names = config.get("architectures")
    return f"{names[0] if isinstance(names, list) and names else 'the model'} ({config.get('model_type')})"


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


def build_skeleton(
    config: Mapping[str, Any], folder: Path, trust_remote_code: bool, max_length: int | None = None
) -> Any:
    """The model in float32 over parameters of one element each, expanded to shape; its buffers are real."""
    require("hf", "reading a Hugging Face checkpoint")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    from instantrt.compiler.frontend.hf_attention import IMPLEMENTATION, register

    register()
    logging.set_verbosity_error()
    where = str(folder / "config.json")
    check_architectures(config, where)
    check_layers(config, where)
    plain_config = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        kwargs = {k: value for k, value in plain_config.items() if k not in ("model_type", "transformers_version")}
        if trust_remote_code and config.get("auto_map"):
            hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            hf_config.__dict__.pop("quantization_config", None)
        else:
            hf_config = AutoConfig.for_model(plain_config.get("model_type", ""), **kwargs)
            check_family(hf_config, where)
        llm_shape(hf_config)  # a model without attention has none
        check_rope(hf_config, max_length, folder / "config.json")
        with no_init_weights(), untouched_parameters():
            model = AutoModelForCausalLM.from_config(
                hf_config, dtype=torch.float32, attn_implementation=IMPLEMENTATION, trust_remote_code=trust_remote_code
            )
            model.tie_weights()  # skipping the initialisation skips this as well
    except UserError:
        raise
    except Exception as error:  # a config is the user's, and what nonsense in it raises is of any type
        if isinstance(error, KeyError) and error.args == (IMPLEMENTATION,):
            what = f"{config['model_type']} has attention of its own, which does not go through transformers' interface"
            raise refusal(what, config, where, ONNX) from error
        raise UserError(
            f"transformers cannot build {family(config)} from this config",
            where=where,
            found=shorten(f"{type(error).__name__}: {error}", FOUND),  # it may name every model there is
            fix=f"the model may need a newer transformers than {version('transformers')}, or a value is not right",
        ) from error
    check_modules(model, where)
    keep_first_table(model)
    return model.eval()


@contextmanager
def untouched_parameters() -> Iterator[None]:
    """Every parameter registered inside is one element expanded to its shape: 70 B parameters cost nothing."""
    import torch

    register = torch.nn.Module.register_parameter

    def register_expanded(self: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        # A tied parameter arrives a second time: it must stay the same object.
        if parameter is not None and parameter.untyped_storage().nbytes() > parameter.element_size():
            expanded = torch.empty((), dtype=parameter.dtype).expand(parameter.shape)
            parameter = torch.nn.Parameter(expanded, requires_grad=False)
        register(self, name, parameter)

    torch.nn.Module.register_parameter = register_expanded  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def llm_shape(config: Any) -> LlmShape:
    text = config.get_text_config()
    heads = text.num_attention_heads
    return LlmShape(
        layers=text.num_hidden_layers,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        max_length=int(getattr(text, "max_position_embeddings", 0) or 0),
    )


def export_graph(model: Any, shape: LlmShape) -> gs.Graph:
    """Exports with dynamic batch, sequence, past and total; parameters come out as graph inputs."""
    import logging
    import warnings

    import onnx_ir as ir
    import torch
    from onnxscript import optimizer

    from instantrt.compiler.frontend.hf_attention import WithCache

    batch, sequence, past = 2, 3, 5  # any sizes that are not 0 or 1, which the exporter would specialise
    cache = [
        tuple(torch.zeros(batch, shape.kv_heads, past, shape.head_dim) for _ in range(2)) for _ in range(shape.layers)
    ]
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    positions = torch.arange(past, past + sequence).expand(batch, sequence)
    dims = {name: torch.export.Dim(name) for name in ("batch", "sequence", "past", "total")}
    tokens = {0: dims["batch"], 1: dims["sequence"]}
    kv = {0: dims["batch"], 2: dims["past"]}
    dynamic = (tokens, {0: dims["batch"], 1: dims["total"]}, tokens, [(kv, kv)] * shape.layers)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.export.export(
            WithCache(model), (ids, mask, positions, cache), dynamic_shapes=dynamic, strict=False
        )
        exported = torch.onnx.export(
            program,
            input_names=shape.input_names(),
            output_names=shape.output_names(),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert exported is not None
    traced = exported.model
    parameters = {f"model.{name}" for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in parameters & set(traced.graph.initializers):
        value = traced.graph.initializers.pop(name)
        value.const_value = None  # nothing may fold what was never written
        traced.graph.inputs.append(value)
    optimizer.optimize_ir(traced, input_size_limit=1 << 16, output_size_limit=1 << 20)
    for i, node in enumerate(traced.graph):
        node.name = f"{module_path(node.metadata_props)}/{node.op_type}_{i}"
    graph = gs.import_onnx(ir.to_proto(traced))
    name_dimensions(graph, shape)
    return graph


def module_path(metadata: Mapping[str, str]) -> str:
    """The module that the exporter recorded on a node, without the wrapper's own prefix."""
    scopes = re.findall(r"'([^']*)'", metadata.get("pkg.torch.onnx.name_scopes", ""))
    modules = [s.removeprefix("model.") for s in scopes[:-1] if s.startswith("model.")]
    return modules[-1] if modules else ""


def name_dimensions(graph: gs.Graph, shape: LlmShape) -> None:
    """Gives the symbolic dimensions the names of the interface, everywhere they occur."""
    tensors = {t.name: t for t in graph.inputs}
    renamed = {
        str(tensors["input_ids"].shape[0]): "batch",
        str(tensors["input_ids"].shape[1]): "sequence",
        str(tensors["attention_mask"].shape[1]): "total",
        str(tensors["past_key_values.0.key"].shape[2]): "past",
    }
    pattern = re.compile("|".join(rf"\b{re.escape(old)}\b" for old in renamed))
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.shape is not None:
            tensor.shape = [pattern.sub(lambda m: renamed[m[0]], d) if isinstance(d, str) else d for d in tensor.shape]
    for output in graph.outputs:
        if output.name != "logits":
            output.shape = ["batch", shape.kv_heads, "total", shape.head_dim]


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
