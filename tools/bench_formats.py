"""Quantized checkpoints of every format against transformers on their dequantized weights, and how fast they stream.

`python -m tools.bench_formats perplexity DIR...` compiles each checkpoint and compares perplexities;
`python -m tools.bench_formats stream` reads and writes a synthetic GPTQ layer; `search` compares ways to quantize.
Each prints a JSON object; benchmarks/ keeps what was measured.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tokenizers import Tokenizer

from compiler.build import Plan, compile_model
from compiler.request import Request
from passes.lazy import Array
from passes.quant import Codes, QuantTensor, dequantize
from tools.make_checkpoints import values
from tools.perplexity import Logits, artifact_logits, perplexity, windows

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
TEXT = Path("examples/text/evaluation.txt")


def dequantized(quant: QuantTensor) -> Array:
    """W [N, K] in float32, inputs in the model's own order."""
    w = np.concatenate([dequantize(Codes(*tile.parts), quant.group_size) for tile in quant.tiles()])
    return w if quant.order is None else w[:, np.argsort(quant.order.indices)]


def reference_logits(planned: Plan, *, int8_tokens: bool = False) -> Logits:
    """Transformers, in float32, on the dequantized weights of what was planned.

    `int8_tokens` also rounds the inputs of A8 layers as they run: per token, symmetric, max|x| / 127.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def rounded(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:  # noqa: ARG001
        (x,) = inputs
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-20) / 127
        return torch.round(x / step) * step

    config = {k: v for k, v in planned.model.config.items() if k not in ("quantization_config", "model_type", "dtype")}
    hf_config = AutoConfig.for_model(planned.model.config["model_type"], **config)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    state = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        decision = planned.decisions.get(name.removesuffix(".weight"))
        stored = planned.model.tensors.get(name)
        if not isinstance(decision, QuantTensor) and stored is None:
            continue  # tied to another
        found = dequantized(decision) if isinstance(decision, QuantTensor) else values(planned.model.tensors[name])
        state[name] = torch.from_numpy(found.astype(np.float32)).reshape(parameter.shape)
    model.load_state_dict(state, strict=False)
    for name, module in model.named_modules():
        decision = planned.decisions.get(name)
        if int8_tokens and isinstance(decision, QuantTensor) and decision.activations == "int8":
            module.register_forward_pre_hook(rounded)

    def run(ids: Array) -> Array:
        with torch.no_grad():
            logits: Array = model(torch.from_numpy(ids)).logits.numpy()
        return logits

    return run


@app.callback()
def main() -> None:
    """Measures quantized checkpoints."""


@app.command("perplexity")
def compare(
    folders: Annotated[list[Path], typer.Argument(help="quantized checkpoints")],
    quant: Annotated[str | None, typer.Option(help="a8w4, say")] = None,
    preset: Annotated[str, typer.Option(help="exact or fast")] = "exact",
    text: Annotated[Path, typer.Option(help="the text")] = TEXT,
) -> None:
    """Print the artifact's perplexity and that of the dequantized weights, for each checkpoint."""
    rows = {}
    for folder in folders:
        with tempfile.TemporaryDirectory() as out:
            request = Request(
                model=folder,
                targets=("x86",),
                out=Path(out),
                quant=quant,
                cpu_preset=preset,  # type: ignore[arg-type]
            )
            planned = compile_model(request)
            parts = list(windows(Tokenizer.from_file(str(folder / "tokenizer.json")), text.read_text("utf-8")))
            expected = perplexity(reference_logits(planned), parts)
            found = perplexity(artifact_logits(Path(out)), parts)
        kinds = Counter(str(q) for q in planned.decisions.values() if isinstance(q, QuantTensor))
        rows[folder.name] = {
            "layers": dict(kinds),
            "dequantized": round(expected, 4),
            "artifact": round(found, 4),
            "difference_percent": round(100 * (found / expected - 1), 4),
        }
        print(folder.name, json.dumps(rows[folder.name]), flush=True)
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    app()
