"""Checkpoints written by the real libraries, to test the readers with: `python -m tests.checkpoints.make make|slim`.

`make` quantizes a float model with GPTQModel or llmcompressor where they are installed, and stores beside each
checkpoint what that library itself dequantizes. `slim` cuts such a folder down to one layer for tests/checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.json_file import read_json
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array, whole
from instantrt.tools.bench.synthetic import write_safetensors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
REFERENCE = "reference_dequant.npz"


@app.callback()
def main() -> None:
    """Checkpoints written by the real libraries, to test the readers with."""


# What GPTQModel makes, and what llmcompressor makes; each by the name of the folder.
GPTQMODEL: dict[str, dict[str, Any]] = {
    "gptq-int4-g128-sym": {"bits": 4, "group_size": 128},
    "gptq-int4-g32-asym": {"bits": 4, "group_size": 32, "sym": False},
    "gptq-int4-g128-asym-v2": {"bits": 4, "group_size": 128, "sym": False, "format": "gptq_v2"},
    "gptq-int4-g128-desc_act": {"bits": 4, "group_size": 128, "desc_act": True, "act_group_aware": False},
    "gptq-int8-perchannel": {"bits": 8, "group_size": -1, "act_group_aware": False},
    "gptq-int8-g128-asym": {"bits": 8, "group_size": 128, "sym": False},
    "gptq-mixed": {"bits": 4, "group_size": 128, "dynamic": {"-:.*o_proj": {}, "+:.*down_proj": {"bits": 8}}},
}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
LLMCOMPRESSOR: dict[str, dict[str, Any]] = {
    "ct-w4a16-g128": {"scheme": "W4A16"},
    "ct-w4a16-g128-asym": {"scheme": "W4A16_ASYM"},
    "ct-w4a16-actorder": {"scheme": "W4A16", "actorder": "weight"},
    "ct-w8a16": {"scheme": "W8A16"},
    "ct-w8a8-dyn": {"scheme": "W8A8"},
    "ct-w8a8-static": {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**INT8, "strategy": "channel"},
                "input_activations": {**INT8, "strategy": "tensor"},
            }
        }
    },
}
REFERENCES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.3.self_attn.o_proj")


@app.command()
def make(
    name: Annotated[str, typer.Argument(help=", ".join((*GPTQMODEL, *LLMCOMPRESSOR)))],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    float_model: Annotated[Path, typer.Option(help="what to quantize")] = Path("examples/tiny-qwen2"),
    text: Annotated[Path, typer.Option(help="calibration text")] = Path("examples/text/evaluation.txt"),
) -> None:
    """Quantizes the float model with the library that NAME belongs to, and stores what it dequantizes beside it."""
    library = {"gptq": make_gptq, "ct": make_compressed}.get(name.partition("-")[0])
    if library is None or name not in {*GPTQMODEL, *LLMCOMPRESSOR}:
        raise UserError("no such checkpoint", found=repr(name), expected=", ".join((*GPTQMODEL, *LLMCOMPRESSOR)))
    try:
        matrices = library(name, out, float_model, text.read_text("utf-8"))
    except ImportError as error:
        raise UserError(
            "the library that makes this checkpoint is not installed",
            where=name,
            found=str(error),
            fix="pip install gptqmodel, or llmcompressor, into an environment of its own",
        ) from None
    np.savez_compressed(out / REFERENCE, allow_pickle=False, **matrices)


def make_gptq(name: str, out: Path, float_model: Path, text: str) -> dict[str, Array]:
    """GPTQModel; its own modules dequantize."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # type: ignore[import-not-found]

    model = GPTQModel.load(str(float_model), QuantizeConfig(**GPTQMODEL[name]))
    lines = [line for line in text.splitlines() if len(line) > 40]
    model.quantize(lines, batch_size=1)
    model.save(str(out))
    loaded = GPTQModel.load(str(out), backend=BACKEND.TORCH, device="cpu").model
    modules = dict(loaded.named_modules())
    found = {path: modules[path] for path in REFERENCES if hasattr(modules[path], "dequantize_weight")}
    return {path: module.dequantize_weight().T.float().numpy() for path, module in found.items()}


def make_compressed(name: str, out: Path, float_model: Path, text: str) -> dict[str, Array]:
    """llmcompressor; transformers and compressed-tensors decompress."""
    import torch
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    tokenizer = AutoTokenizer.from_pretrained(float_model)
    ids = tokenizer(text)["input_ids"]
    windows = [ids[i : i + 256] for i in range(0, len(ids) - 255, 256)]
    rows = [{"input_ids": torch.tensor(w), "attention_mask": torch.ones(len(w), dtype=torch.int64)} for w in windows]
    data: Any = torch.utils.data.DataLoader(rows, batch_size=1)  # type: ignore[arg-type]
    options = LLMCOMPRESSOR[name]
    modifier = GPTQModifier if "actorder" in options else QuantizationModifier
    targets = {} if "config_groups" in options else {"targets": "Linear"}
    model = AutoModelForCausalLM.from_pretrained(float_model, dtype=torch.bfloat16)
    recipe = modifier(ignore=["lm_head"], **targets, **options)
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=256, num_calibration_samples=len(windows))
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
    plain = CompressedTensorsConfig(run_compressed=False)
    loaded = AutoModelForCausalLM.from_pretrained(out, quantization_config=plain, dtype=torch.bfloat16)
    modules = dict(loaded.named_modules())
    return {path: modules[path].weight.detach().float().numpy() for path in REFERENCES}


@app.command()
def slim(source: Path, out: Path, float_model: Path = Path("examples/tiny-qwen2")) -> None:
    """Keeps layer 0 of SOURCE. Tensors equal to the float model's are left out; the tests put them back from there.

    The library's dequantized matrices become SHA-256 digests of their float32 bytes.
    """
    config = read_json(source / "config.json")
    config["num_hidden_layers"] = 1
    config["layer_types"] = config.get("layer_types", [])[:1]
    base = read_checkpoint(float_model)
    kept = {}
    for name, tensor in read_checkpoint(source).items():
        other_layer = ".layers." in name and ".layers.0." not in name
        same = name in base and base[name].dtype == tensor.dtype and (whole(base[name]) == whole(tensor)).all()
        if not other_layer and not same:
            kept[name] = whole(tensor)
    reference = np.load(source / REFERENCE)
    digests = {
        name: hashlib.sha256(np.ascontiguousarray(reference[name], np.float32).tobytes()).hexdigest()
        for name in reference.files
        if ".layers.0." in name and not name.endswith(".fp16")
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "reference.json").write_text(json.dumps(digests, indent=2) + "\n")
    if (source / "quantize_config.json").is_file():
        shutil.copyfile(source / "quantize_config.json", out / "quantize_config.json")
    write_safetensors(out / "model.safetensors", kept)


if __name__ == "__main__":
    app()
