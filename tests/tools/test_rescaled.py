"""Copies of a checkpoint that are as good as it: what two layers make of one another stays what it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FLOAT32, Array, convert, whole
from instantrt.tools.bench.rescaled import NORMS, outliers, regrid
from tests.conftest import TINY

HEAD, REPEATS = 64, 2  # query heads that share one of v


def tensors_of(folder: Path) -> dict[str, Array]:
    return {
        n: convert(whole(t), FLOAT32) for n, t in read_checkpoint(folder).items() if n.startswith("model.layers.1.")
    }


def products(folder: Path) -> list[Array]:
    """Of the second layer: each linear with the norm before it, and what o makes of v and its bias, down of up."""
    t = {name.removeprefix("model.layers.1."): values for name, values in tensors_of(folder).items()}
    behind = {user: t[f"{user}.weight"] * t[f"{norm}.weight"] for norm, users in NORMS.items() for user in users}
    o = t["self_attn.o_proj.weight"].reshape(-1, REPEATS, REPEATS, HEAD)[:, :, 0]  # [H, heads of v, HEAD]
    v, up = behind.pop("self_attn.v_proj"), behind.pop("mlp.up_proj")
    values = [np.einsum("hnd,ndk->nhk", o, w.reshape(REPEATS, HEAD, -1)) for w in (v, t["self_attn.v_proj.bias"])]
    return [*behind.values(), *values, t["mlp.down_proj.weight"] @ up]


def test_outliers_change_no_bit_of_a_product(tmp_path: Path) -> None:
    outliers(TINY, tmp_path / "copy")
    before, after = (
        tensors_of(folder)["model.layers.1.input_layernorm.weight"] for folder in (TINY, tmp_path / "copy")
    )
    assert sorted(after / before)[-5:] == [1, 32, 32, 32, 32]
    assert (tmp_path / "copy" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("copy", "bound"), [(outliers, 1e-6), (regrid, 1e-2)])  # bfloat16 keeps 8 bits
def test_products_stay(copy: object, bound: float, tmp_path: Path) -> None:
    assert callable(copy)
    copy(TINY, tmp_path / "copy")
    for before, after in zip(products(TINY), products(tmp_path / "copy"), strict=True):
        assert np.linalg.norm(after - before) < bound * np.linalg.norm(before)


def test_a_model_of_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no safetensors weights"):
        outliers(tmp_path, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
