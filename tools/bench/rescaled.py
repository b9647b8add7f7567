"""Float-equal copies of a checkpoint that are harder to quantize: what one layer scales up, the next scales down.

`instantrt bench rescaled outliers SRC DST` makes a few channels of each norm loud, as large models have them by
themselves; `instantrt bench rescaled regrid SRC DST` takes the weights off any grid that they were rounded to before,
on which four bits would cost nothing. For Llama and what has its names, biases of q, k and v included.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from instantrt.compiler.checkpoint import SINGLE, read_checkpoint
from instantrt.compiler.json_file import read_json
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FLOAT32, Array, convert, whole
from instantrt.tools.bench.synthetic import write_safetensors
from instantrt.tools.cli.options import PlainCommand, PlainGroup

main = typer.Typer(cls=PlainGroup, add_completion=False, pretty_exceptions_enable=False)
Source = Annotated[Path, typer.Argument(help="float checkpoint, of the Llama family or Qwen2")]
Target = Annotated[Path, typer.Argument(help="new folder for the copy")]
NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
LOUD, BY = 4, 32  # channels of each norm, and how much louder: a power of two, so that no bit is lost
SPREAD = 0.25  # of the logarithm of a factor


@main.command(cls=PlainCommand)
def outliers(source: Source, target: Target) -> None:
    """Write a copy with four loud channels behind each norm of a layer."""
    random = np.random.default_rng(0)

    def loud(count: int) -> Array:
        factors = np.ones(count, np.float32)
        factors[random.choice(count, LOUD, replace=False)] = BY
        return factors

    write_rescaled(source, target, loud, lambda count: np.ones(count, np.float32))


@main.command(cls=PlainCommand)
def regrid(source: Source, target: Target) -> None:
    """Write a copy with random factors between norms and linears, v and o, up and down."""
    random = np.random.default_rng(1)

    def spread(count: int) -> Array:
        return np.exp(SPREAD * random.standard_normal(count)).astype(np.float32)

    write_rescaled(source, target, spread, spread)


Factors = Callable[[int], Array]  # how many -> that many


def write_rescaled(source: Path, target: Path, norms: Factors, inner: Factors) -> None:
    """`norms` between a norm and the linears behind it, `inner` between v and o, up and down."""
    stored = read_checkpoint(source)
    tensors = {name: convert(whole(tensor), FLOAT32).copy() for name, tensor in stored.items()}
    config = read_json(source / "config.json")
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for layer in layers_of(tensors, source):
        for norm, users in NORMS.items():
            factors = norms(len(tensors[f"{layer}{norm}.weight"]))
            tensors[f"{layer}{norm}.weight"] *= factors
            for user in users:
                tensors[f"{layer}{user}.weight"] /= factors
        for maker, user in (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")):
            made, used = tensors[f"{layer}{maker}.weight"], tensors[f"{layer}{user}.weight"]
            factors = inner(len(made))
            made *= factors[:, None]
            if (bias := tensors.get(f"{layer}{maker}.bias")) is not None:
                bias *= factors
            repeats = used.shape[1] // len(factors)  # query heads that share a head of v
            used /= np.repeat(factors.reshape(-1, head), repeats, axis=0).reshape(-1) if repeats > 1 else factors
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    write_safetensors(target / SINGLE, {name: w.astype(stored[name].dtype) for name, w in tensors.items()})


def layers_of(tensors: dict[str, Array], source: Path) -> Iterator[str]:
    """`model.layers.0.`, and so on."""
    mark = "input_layernorm.weight"
    found = [name.removesuffix(mark) for name in tensors if name.endswith(mark)]
    needed = [f"{layer}{user}.weight" for layer in found for users in NORMS.values() for user in users]
    if not found or any(name not in tensors for name in needed):
        raise UserError("no layers as Llama has them", where=str(source), expected=", ".join(NORMS))
    yield from found
