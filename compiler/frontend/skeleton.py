"""A model as its config announces it: modules, parameters of no size, real buffers. No weight is read or made."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

import numpy as np

from instantrt.compiler.frontend.architecture import (
    CAUSAL_LM,
    ONNX,
    Head,
    check_architectures,
    check_family,
    check_layers,
    check_modules,
    refusal,
)
from instantrt.compiler.frontend.model import EncoderShape, Interface, LlmShape
from instantrt.compiler.frontend.rope import keep_first_table, switches
from instantrt.compiler.frontend.sentence import SentencePipeline
from instantrt.passes.core.errors import FOUND, UserError, require
from instantrt.passes.core.lazy import Array

# Of a config: what it says of its writer, of weights, and of the form in which a call returns.
NOT_OF_THE_MODEL = ("quantization_config", "transformers_version", "return_dict", "use_return_dict")


def family(config: Mapping[str, Any]) -> str:
    """What its users call a model: `LlamaForCausalLM (llama)`."""
    names = config.get("architectures")
    return f"{names[0] if isinstance(names, list) and names else 'the model'} ({config.get('model_type')})"


def announced(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config, what its model is built from."""
    return {key: value for key, value in config.items() if key not in NOT_OF_THE_MODEL}


def read_by_transformers(config: Mapping[str, Any]) -> Any:
    """transformers' config of what a config.json announces.

    It is read of a file, as transformers reads it: on the way some types become others, and numbers that JSON does not
    have are decoded (docs/facts.md, "What transformers makes of a config.json").
    """
    from transformers import AutoConfig

    said = {key: value for key, value in announced(config).items() if key != "auto_map"}  # which is there, and empty
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(said), "utf-8")
        return AutoConfig.from_pretrained(folder)


def build_skeleton(
    config: Mapping[str, Any],
    folder: Path,
    trust_remote_code: bool,
    head: Head = CAUSAL_LM,
    pipeline: SentencePipeline | None = None,
) -> Any:
    """The model in float32 over parameters of one element each, expanded to shape; its buffers are real."""
    require("hf", "reading a Hugging Face checkpoint")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers
    from transformers import AutoConfig
    from transformers.utils import logging

    from instantrt.compiler.frontend.hf_attention import IMPLEMENTATION, register

    register()
    logging.set_verbosity_error()
    where = str(folder / "config.json")
    check_architectures(config, head, where)
    check_layers(config, where)
    try:
        if trust_remote_code and config.get("auto_map"):
            hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            hf_config.__dict__.pop("quantization_config", None)
        else:
            hf_config = read_by_transformers(config)
            check_family(hf_config, head, where)
        llm_shape(hf_config)  # a model without attention has none
        switches(hf_config, where)  # unknown kinds are refused by name
        with untouched_parameters():
            model = getattr(transformers, head.auto).from_config(
                hf_config, dtype=torch.float32, trust_remote_code=trust_remote_code, **keywords(hf_config, head)
            )
            model.tie_weights()  # skipping the initialisation skips this as well
            if pipeline is not None:
                from instantrt.compiler.frontend.sentence_modules import attach

                attach(model, pipeline.modules)
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
    check_modules(model, head, where)
    check_positions(model, where)
    keep_first_table(model)
    return model.eval()


def adapt(model: Any, untied: Iterable[str], buffers: Mapping[str, Array]) -> None:
    """Makes the parameters `untied` their own, of no size like all, and gives buffers the values of the file."""
    import torch

    for name in untied:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        own = torch.empty((), dtype=torch.float32).expand(getattr(module, leaf).shape)
        setattr(module, leaf, torch.nn.Parameter(own, requires_grad=False))
    named = dict(model.named_buffers())
    for name, values in buffers.items():
        named[name].copy_(torch.from_numpy(np.ascontiguousarray(values)).reshape(named[name].shape))


@contextmanager
def untouched_parameters() -> Iterator[None]:
    """Every parameter registered inside is one element expanded to its shape: 70 B parameters cost nothing."""
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers.initialization import no_init_weights

    class Unwritten(TorchFunctionMode):
        """Some modules write first values themselves, which one element cannot take; nor is any of them looked at."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            written = args[0] if args and re.search(r"[^_]_$|^__setitem__$", func.__name__) else None
            if isinstance(written, torch.Tensor) and written.numel() > 1 and is_one(written):
                return written
            return func(*args, **(kwargs or {}))

    def is_one(tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().nbytes() <= tensor.element_size()

    def register_expanded(self: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        # A tied parameter arrives a second time: it must stay the same object.
        if parameter is not None and not is_one(parameter):
            expanded = torch.empty((), dtype=parameter.dtype).expand(parameter.shape)
            parameter = torch.nn.Parameter(expanded, requires_grad=False)
        register(self, name, parameter)

    register = torch.nn.Module.register_parameter
    torch.nn.Module.register_parameter = register_expanded  # type: ignore[assignment, method-assign]
    try:
        with no_init_weights(), Unwritten():
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def keywords(config: Any, head: Head) -> dict[str, Any]:
    """How a class is asked for our attention, and for no more than the hidden states of a model without a head."""
    from transformers.models.auto import modeling_auto

    from instantrt.compiler.frontend.hf_attention import IMPLEMENTATION

    if head is CAUSAL_LM:
        return {"attn_implementation": IMPLEMENTATION}
    config.use_cache = False
    kind = getattr(modeling_auto, head.mapping).get(type(config), None)
    own = not getattr(kind, "_supports_attention_backend", False)  # operators of its own, which are exported as such
    pooler = "add_pooling_layer" in inspect.signature(kind.__init__).parameters and head.auto == "AutoModel"
    return {
        "attn_implementation": "eager" if own else IMPLEMENTATION,
        **({"add_pooling_layer": False} if pooler else {}),
    }


def shape_of(model: Any, head: Head, pipeline: SentencePipeline | None) -> Interface:
    """The sizes of the model's interface."""
    if head is CAUSAL_LM:
        return llm_shape(model.config)
    text = model.config.get_text_config()
    sizes = {"classify": "num_labels", "classify_tokens": "num_labels", "fill_mask": "vocab_size"}
    width = getattr(text, sizes.get(head.task, "hidden_size"))
    lengths = [positions(model), pipeline.max_length if pipeline is not None else 0]
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    return EncoderShape(
        task=head.task,
        layers=text.num_hidden_layers,
        vocab=text.vocab_size,
        width=pipeline.width(width) if pipeline is not None else width,
        max_length=min((length for length in lengths if length), default=0),
        token_types=takes and (getattr(text, "type_vocab_size", 0) or 0) > 1,
    )


def other_heads(model: Any, config: Mapping[str, Any]) -> list[str]:
    """Parameters of the class that `architectures` names which `model`, a model without a head, has no place for.

    A sentence-transformers folder often says BertForMaskedLM, and has that head's tensors; and hidden states come
    without what some classes make of the first of them.
    """
    import transformers

    kind: Any = getattr(transformers, next(iter(config.get("architectures") or []), ""), None)
    if not isinstance(kind, type(transformers.PreTrainedModel)) or not issubclass(kind, transformers.PreTrainedModel):
        return []
    prefix = f"{kind.base_model_prefix}."
    with untouched_parameters():
        names = dict(kind(model.config).named_parameters(remove_duplicate=False))
    own = dict(model.named_parameters(remove_duplicate=False))
    return [name for name in names if name not in own and name.removeprefix(prefix) not in own]


def positions(model: Any) -> int:
    """Tokens that have a position."""
    longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)
    pad = padding(model)
    return longest - pad - 1 if longest and pad is not None else 0


def padding(model: Any) -> int | None:
    """The number of the token that pads, behind which the positions of RoBERTa and its kin begin; -1 for others."""
    counted = (m for m in model.modules() if hasattr(m, "padding_idx") and hasattr(m, "position_embeddings"))
    return next((module.padding_idx for module in counted), -1)


def check_positions(model: Any, where: str) -> None:
    """Refuses a model whose padding leaves no position for a token, or nobody knows which."""
    longest, pad = getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0, padding(model)
    if pad is None or (longest and longest <= pad + 1):
        raise UserError(
            f"the positions of {type(model).__name__} begin behind pad_token_id, which leaves none",
            where=where,
            expected=f"a token's number below {longest - 1}; that of RoBERTa is 1",
            found="null" if pad is None else str(pad),
            fix="give the number that the model was trained with as pad_token_id",
        )


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
