"""What a transformers model calls while it is exported: ONNX Attention, and one explicit mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function

from instantrt.compiler.frontend.model import OPSET
from instantrt.passes.core.errors import UserError

IMPLEMENTATION = "instantrt"
# Tensors that say of tokens where they are, which the mask does as well; any other one is a part of the arithmetic.
PLACES = ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")
Tensor: TypeAlias = torch.Tensor


def register() -> None:
    """Makes `attn_implementation="instantrt"` known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, additive_mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [B, H, S, D], key and value [B, Hkv, T, D], mask [B, 1, S, T] -> [B, S, H, D].

    Opset 23 adds the mask before it caps the scores, transformers after; a capped score is therefore computed in plain
    operators, where the order is visible.
    """
    if strange := [name for name, value in others.items() if isinstance(value, Tensor) and name not in PLACES]:
        what = f"attention that reads {', '.join(strange)} is not supported"
        raise UserError(what, where=type(module).__name__, expected="queries, keys, values and a mask")
    batch, heads, sequence, width = query.shape
    scale = float(scaling if scaling is not None else width**-0.5)
    if softcap:
        groups = heads // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
        y = torch.softmax(scores + attention_mask, -1) @ value
    else:
        y = torch.onnx.ops.symbolic(
            "Attention",
            (query, key, value, attention_mask),
            {"scale": scale},
            dtype=query.dtype,
            shape=(batch, heads, sequence, value.shape[3]),
            version=OPSET,
        )
    return y.transpose(1, 2), None


def additive_mask(
    batch_size: int,  # noqa: ARG001  (the mask has a row for each sequence already)
    q_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor,
    dtype: torch.dtype = torch.float32,
    **others: Any,  # noqa: ARG001
) -> Tensor:
    """0 where a query may look and the lowest float where not: [B, 1, S, total].

    Everything is measured from `attention_mask` [B, total], never from the cache's own length, so that the same graph
    runs on a cache of the exact length and on one allocated at its maximum. A row ends at the last key it allows, and
    its queries are the last of it: a window of keys is then right in rows of different lengths, too.
    """
    batch, total = attention_mask.shape
    allowed = attention_mask.to(torch.bool)
    if mask_function is bidirectional_mask_function:
        seen = allowed[:, None, None, :].expand(batch, 1, q_length, total)
        return torch.where(seen, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)
    keys = torch.arange(total)
    end = torch.where(allowed, keys + 1, 0).amax(1)
    queries = torch.maximum(end - q_length, torch.zeros_like(end))[:, None] + torch.arange(q_length)
    rows, heads = torch.arange(batch)[:, None, None, None], torch.zeros((1, 1, 1, 1), dtype=torch.int64)
    visible = mask_function(rows, heads, queries[:, None, :, None], keys) & allowed[:, None, None, :]
    return torch.where(visible, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)
