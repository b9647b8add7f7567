"""LoRA adapters: merged as peft merges them, over every kind of module, and refused by name where they cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from instantrt.compiler.artifact.manifest import read_manifest
from instantrt.compiler.compile import compile_model
from instantrt.compiler.frontend import load
from instantrt.compiler.request import Request
from instantrt.passes.core.lazy import Array, whole
from tests.conftest import TINY
from tests.models import FAMILIES, SIZES

CLOSE = 1e-6  # of the largest weight: peft sums in float32, in an order of its own


def made(family: str, folder: Path, **fields: Any) -> Any:
    """A tiny random model in `folder`, in bfloat16: its weights are no float32 of their own."""
    torch.manual_seed(0)
    given = {"model_type": family, **SIZES, "num_hidden_layers": 2, **FAMILIES.get(family, {}), **fields}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(given.pop("model_type"), **given))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, **fields: Any) -> PeftModel:
    """An adapter over `base`, saved in `folder`, every trainable tensor of it random."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **fields}))
    torch.manual_seed(1)
    for name, parameter in lora.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 1.0 if "magnitude" in name else 0.0, 0.1)
    lora.save_pretrained(folder)
    return lora


def merged(base: Path, folder: Path) -> dict[str, Array]:
    """What peft makes of both, read back from their files."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return {k: v.numpy() for k, v in PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict().items()}


def assert_merged(found: Any, wanted: dict[str, Array]) -> None:
    assert set(found.tensors) <= set(wanted)
    for name, tensor in found.tensors.items():
        difference = np.abs(whole(tensor).astype(np.float32) - wanted[name]).max()
        assert difference <= CLOSE * np.abs(wanted[name]).max(), name


def test_a_folder_compiles(tmp_path: Path) -> None:
    """The artifact of base and adapter is the one of the model that peft has merged and saved, but for roundings."""
    trained(TINY, tmp_path / "lora", target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.mlp.down_proj": 8})
    assert_merged(load(TINY, adapter=tmp_path / "lora"), merged(TINY, tmp_path / "lora"))
    compile_model(Request(TINY, ("x86",), tmp_path / "out", quant="a16w8", adapter=tmp_path / "lora"))
    (artifact,) = read_manifest(tmp_path / "out")
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= set(artifact.source["files"])
