"""The ranges of shapes that an engine is built for."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.compiler.backend.tensorrt.build import check_profile
from instantrt.compiler.backend.tensorrt.profiles import EngineLimits, profiles
from instantrt.passes.core.errors import UserError

INPUTS = [
    gs.Variable("input_ids", np.int64, ["batch", "sequence"]),
    gs.Variable("attention_mask", np.int64, ["batch", "total"]),
    gs.Variable("past", np.float16, ["batch", 2, "past", 64]),
]


@pytest.mark.parametrize(
    "limits", [EngineLimits(*sizes) for sizes in ((), (8, 4096, 512), (1, 2, 1), (3, 2, 2))], ids=str
)
def test_prefill_and_decode(limits: EngineLimits) -> None:
    both = profiles(INPUTS, limits, llm=True)
    for number, each in enumerate(both):
        check_profile(each, f"profile {number}")
    prefill, decode = both
    assert prefill["input_ids"][2][1] == limits.max_length
    assert prefill["past"][0][2] == 0
    assert {profile["input_ids"][2][0] for profile in both} == {limits.max_batch}
    rows = decode["input_ids"][2]
    assert rows[0] * rows[1] >= 2, "a product of one row is not fused"


def test_a_plain_model_has_one_profile_and_a_fixed_one_none() -> None:
    (only,) = profiles(INPUTS[:1], EngineLimits(4, 128, 32), llm=False)
    assert only == {"input_ids": ((1, 1), (1, 32), (4, 128))}
    fixed = [gs.Variable("x", np.float16, [1, 8])]
    assert profiles(fixed, EngineLimits(), llm=False) == ()


@pytest.mark.parametrize("wrong", [(0, 8, 8), (1, 1, 1), (1, 8, 9), (1, 8, 0)])
def test_limits_that_contradict_each_other(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(UserError):
        EngineLimits(*wrong)


def test_sizes_of_other_names_are_refused() -> None:
    """As other exporters of causal LMs name them."""
    ids = gs.Variable("input_ids", np.dtype(np.int64), ["batch_size", "sequence_length"])
    with pytest.raises(UserError, match="input_ids: a size of an input"):
        profiles([ids], EngineLimits(), llm=True)
