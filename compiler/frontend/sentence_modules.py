"""The modules of a sentence-transformers pipeline in torch, as they are exported behind a language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from instantrt.compiler.frontend.sentence import SentenceModule

Tensor: TypeAlias = torch.Tensor
SMALLEST = 1e-9  # what sentence-transformers divides by at least
NORM = 1e-12  # likewise


def attach(model: Any, modules: Sequence[SentenceModule]) -> None:
    """Gives the language model its modules, whose weights have the names of their folders.

    Weights have no storage: their sizes were not held against the files yet.
    """
    model.sentence_modules = tuple(modules)
    for module in modules:
        own = torch.nn.Module()
        if module.kind == "Dense":
            own.linear = torch.nn.Linear(*module.sizes, bias=module.bias, device="meta")
        elif module.kind == "LayerNorm":
            own.norm = torch.nn.LayerNorm(module.sizes[1], device="meta")
        else:
            continue
        model.add_module(module.name, own)


def pooled(model: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    """hidden [B, S, H], mask [B, S] -> sentence_embedding [B, W]."""
    x = hidden
    for module in model.sentence_modules:
        x = BY_KIND[module.kind](model, module, x, mask)
    return x


def activated(module: SentenceModule, x: Tensor) -> Tensor:
    y: Tensor = getattr(torch.nn, module.activation)()(x)
    return y


def first_of(mask: Tensor) -> Tensor:
    """[B]: where each row begins; padding may be on the left."""
    return mask.to(torch.int32).argmax(1)


def token(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, H], index [B] -> [B, H]."""
    return torch.gather(x, 1, index[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)


def total(x: Tensor, weights: Tensor) -> Tensor:
    return (x * weights[:, :, None]).sum(1)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return weighted(x, mask.to(x.dtype))


def weighted(x: Tensor, weights: Tensor) -> Tensor:
    return total(x, weights) / weights.sum(1, keepdim=True).clamp(min=SMALLEST)


def mean_sqrt(x: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(x.dtype)
    return total(x, weights) / torch.sqrt(weights.sum(1, keepdim=True).clamp(min=SMALLEST))


def weighted_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The first token counts once, the second twice, and so on."""
    return weighted(x, (torch.arange(1, x.shape[1] + 1) - first_of(mask)[:, None]).to(x.dtype) * mask.to(x.dtype))


def largest(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[:, :, None] != 0, x, torch.finfo(x.dtype).min).amax(1)


def last_token(x: Tensor, mask: Tensor) -> Tensor:
    return token(x, x.shape[1] - 1 - first_of(mask.flip(1)))


POOLED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda x, mask: token(x, first_of(mask)),
    "max": largest,
    "mean": mean,
    "mean_sqrt_len_tokens": mean_sqrt,
    "weightedmean": weighted_mean,
    "lasttoken": last_token,
}
BY_KIND: Mapping[str, Callable[[Any, SentenceModule, Tensor, Tensor], Tensor]] = {
    "Pooling": lambda model, module, x, mask: torch.cat([POOLED[mode](x, mask) for mode in module.modes], -1),
    "Dense": lambda model, module, x, mask: activated(module, model.get_submodule(f"{module.name}.linear")(x)),
    "LayerNorm": lambda model, module, x, mask: model.get_submodule(f"{module.name}.norm")(x),
    "Normalize": lambda model, module, x, mask: x / torch.sqrt((x * x).sum(-1, keepdim=True)).clamp(min=NORM),
    "Truncate": lambda model, module, x, mask: x[:, : module.sizes[1]],
}
