"""What options and the files of a checkpoint decide, refused before torch is imported and the model exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from instantrt.compiler.backend.tensorrt.choose import choose_builder
from instantrt.compiler.cache_type import check_cache_type
from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.decide import check_head, resolve, step_of
from instantrt.compiler.fit import check_text
from instantrt.compiler.frontend.architecture import CAUSAL_LM, Head, head_of
from instantrt.compiler.frontend.gguf import gguf_at
from instantrt.compiler.frontend.gguf.file import open_gguf
from instantrt.compiler.frontend.gguf.folder import checkpoint_of
from instantrt.compiler.frontend.model import CLASSIFIERS, FloatModel
from instantrt.compiler.frontend.sentence_files import read_pipeline
from instantrt.compiler.json_file import read_json
from instantrt.compiler.quant import gguf, instant
from instantrt.compiler.quant.readers import announced_reader, unannounced_reader
from instantrt.compiler.request import Request, refuse_cosine, refuse_of_llm
from instantrt.compiler.serving.runtime.text import open_tokenizer
from instantrt.compiler.support import check_supported
from instantrt.compiler.target import Backend
from instantrt.passes.core.errors import UserError, tried

CONFIG = "config.json"
HEADLESS = ("embed", "hidden", *CLASSIFIERS)  # tasks of models without the head of a language model


def check_early(request: Request) -> None:
    """Refuses what the plan would refuse, too, but behind the export."""
    for target in request.resolved_targets():
        if target.backend is Backend.TENSORRT:
            choose_builder(target, request.builder, options=request.engine_options())
    check_text(request)
    if request.max_ppl_increase is not None and request.text is None:
        raise UserError("perplexity needs a text", fix="--text FILE")
    check_widths(request)
    announced = announced_model(request)
    if announced is not None and announced[0] is not CAUSAL_LM:
        refuse_of_llm(request)
    check_cache_type(request)
    if announced is None:
        return
    head, model = announced
    if head is not CAUSAL_LM:
        check_room(request, model.folder)
    else:
        refuse_cosine(request.min_cosine, str(request.model))
    config = resolve(request, model)
    check_supported(request.resolved_targets(), config, plugin=request.plugin is not None)
    if head.task in HEADLESS:
        check_head(request, config, ())
    longest = sizes_of(model.config).get("max_position_embeddings")
    if head is CAUSAL_LM and type(longest) is int and longest > 0:
        request.engine_limits(longest)


def check_room(request: Request, folder: Path) -> None:
    """Refuses a length that what a tokenizer puts around each text fills: all texts would be one."""
    if request.max_length is None or not (folder / "tokenizer.json").is_file():
        return
    with tried("reading the tokenizer", where=str(folder / "tokenizer.json"), fix="copy it again from the model"):
        around = open_tokenizer(folder).num_special_tokens_to_add(is_pair=False)
    if request.max_length <= around:
        raise UserError(
            "max_length leaves no token of a text",
            where=str(request.model),
            expected=f"at least {around + 1}: the tokenizer puts {around} around each",
            found=str(request.max_length),
        )


def announced_model(request: Request) -> tuple[Head, FloatModel] | None:
    """What a model is for, and its files without its graph; None for an .onnx file, or the folder of an adapter.

    None, too, where something is wrong with them: the frontend says that, with all else that is.
    """
    file = gguf_at(request.model)
    try:
        if file is not None:
            with tried("reading the GGUF file", where=str(file)):
                config, codes = checkpoint_of(open_gguf(file), str(file), requantize=request.requantize)
            return CAUSAL_LM, FloatModel(gs.Graph(), file.parent, config, codes, None, reader=gguf.detect(codes))
        pipeline = read_pipeline(request.model)
        folder = pipeline.folder if pipeline is not None else request.model
        if not (folder / CONFIG).is_file():
            return None
        config, tensors = read_json(folder / CONFIG), read_checkpoint(folder)
        head = head_of(config, str(folder / CONFIG), pooled=pipeline is not None)
        reader = announced_reader(folder, config) or unannounced_reader(tensors)
    except (UserError, OSError):
        return None
    return head, FloatModel(gs.Graph(), folder, config, tensors, None, reader=reader)


def sizes_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that is about text; none where that is no object, which the frontend refuses."""
    sizes = config.get("text_config", config)
    return sizes if isinstance(sizes, dict) else {}


def check_widths(request: Request) -> None:
    """Refuses the size of a group that does not fit the width of all layers, which config.json says.

    Those that are ignored are known by layer alone.
    """
    said = request.quant_config or {}
    size = request.group_size if request.group_size is not None else said.get("group_size")
    if type(size) is not int or size < 1 or request.ignore or said.get("ignore"):
        return
    if not (request.model / CONFIG).is_file() or gguf_at(request.model) is not None:
        return
    config = read_json(request.model / CONFIG)
    if "quantization_config" in config:
        return
    sizes = sizes_of(config)
    experts = any("expert" in key for key in sizes)  # such a config may have an intermediate_size that no layer has
    keys = ("hidden_size", "intermediate_size")[: 1 if experts else 2]
    widths = {f"{CONFIG}, {key}": sizes[key] for key in keys if type(sizes.get(key)) is int and sizes[key] > 0}
    instant.check_groups(widths, size, step_of(request.resolved_targets()), instead=", or --ignore some layers")
