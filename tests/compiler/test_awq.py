"""AWQ's gemm layout: nibble order, zeros or none, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.quant import awq, stored
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array
from instantrt.passes.core.quant import QuantTensor
from instantrt.tools.bench.synthetic import write_safetensors
from tests.checkpoints import decoded, weight

PATH = "model.layers.0.mlp.up_proj"
N, K, GROUP = 24, 32, 16
RANDOM = np.random.default_rng(3)


def pack(matrix: Array) -> Array:
    """[R, C] -> int32 [R, C / 8]: a word has its columns 0 2 4 6 1 3 5 7, from the lowest bits up."""
    columns = matrix.reshape(len(matrix), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].astype(np.uint64)
    return (columns << (4 * np.arange(8, dtype=np.uint64))).sum(axis=2).astype(np.uint32).view(np.int32)


def tensors_of(codes: Array, zero: Array | None, scale: Array) -> dict[str, Array]:
    parts = {"qweight": pack(codes), "scales": scale} | ({} if zero is None else {"qzeros": pack(zero)})
    return {f"{PATH}.{name}": array for name, array in parts.items()}


def read(folder: Path, tensors: dict[str, Array], n: int = N, **config: Any) -> QuantTensor:
    write_safetensors(folder / "model.safetensors", tensors)
    raw = {"bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True} | config
    quant = awq.parse_awq(raw, "test").read(stored.StoredLayer(PATH, (n, K), read_checkpoint(folder)))
    assert isinstance(quant, QuantTensor)
    return quant


def layer() -> tuple[Array, Array, Array]:
    scale = (RANDOM.random((K // GROUP, N)) + 0.1).astype(np.float16)
    return RANDOM.integers(0, 16, (K, N)), RANDOM.integers(0, 16, (K // GROUP, N)), scale


def test_codes_and_zeros_keep_their_channels(tmp_path: Path) -> None:
    codes, zero, scale = layer()
    quant = read(tmp_path, tensors_of(codes, zero, scale))
    np.testing.assert_array_equal(decoded(quant).codes, codes.T)
    np.testing.assert_array_equal(decoded(quant).zero, zero.T)
    group = np.arange(K) // GROUP
    np.testing.assert_array_equal(weight(quant), ((codes - zero[group]) * scale[group].astype(np.float32)).T)


@pytest.mark.parametrize("stored_zeros", [False, True])
def test_without_zero_points_the_centre_is_zero(stored_zeros: bool, tmp_path: Path) -> None:
    codes, zero, scale = layer()
    quant = read(tmp_path, tensors_of(codes, np.full_like(zero, 8) if stored_zeros else None, scale), zero_point=False)
    assert quant.symmetric
    assert (decoded(quant).zero == 8).all()


def test_zero_points_that_were_denied_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="zero_point=false"):
        decoded(read(tmp_path, tensors_of(*layer()), zero_point=False))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"version": "gemv"}, "AWQ version"),
        ({"version": 3}, "AWQ version"),
        ({"version": None, "format": "gemv"}, "AWQ version"),
        ({"version": "GEMM", "checkpoint_format": "gemv"}, "mean the same"),
        ({"bits": 8}, "AWQ bits"),
        ({"group_size": 24}, "does not divide"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 32}, "disagrees"),
        ({"zero_point": "yes"}, "zero_point"),
        ({"n": 20}, "eight outputs"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read(tmp_path, tensors_of(*layer()), **config)
