"""A model as its config announces it: modules, parameters of no size, real buffers. No weight is read or made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from instantrt.compiler.frontend.architecture import (
    ONNX,
    check_architectures,
    check_family,
    check_layers,
    check_modules,
    refusal,
)
from instantrt.compiler.frontend.model import LlmShape
from instantrt.compiler.frontend.rope import keep_first_table, switches
from instantrt.passes.core.errors import FOUND, UserError, require
from instantrt.passes.core.lazy import Array


def family(config: Mapping[str, Any]) -> str:
    """What its users call a model: `LlamaForCausalLM (llama)`."""
    names = config.get("architectures")
    return f"{names[0] if isinstance(names, list) and names else 'the model'} ({config.get('model_type')})"


def announced(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config, what its model is built from."""
    return {key: value for key, value in config.items() if key not in ("quantization_config", "transformers_version")}


def build_skeleton(config: Mapping[str, Any], folder: Path, trust_remote_code: bool) -> Any:
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
    try:
        kwargs = announced(config)
        model_type = kwargs.pop("model_type", "")
        if trust_remote_code and config.get("auto_map"):
            hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            hf_config.__dict__.pop("quantization_config", None)
        else:
            hf_config = AutoConfig.for_model(model_type, **kwargs)
            check_family(hf_config, where)
        llm_shape(hf_config)  # a model without attention has none
        switches(hf_config, where)  # unknown kinds are refused by name
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
