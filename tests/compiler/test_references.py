"""Every format, decoded, equals bit for bit what the library that wrote it dequantizes."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoints import HERE, NAMES, SHAPES, digest, read_layer, weight


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_dequantizes_as_its_library(name: str, path: str) -> None:
    expected = json.loads((HERE / name / "reference.json").read_text())[path]
    found = weight(read_layer(HERE / name, path, SHAPES[path]))
    if name.startswith("ct-"):  # that library dequantizes in bfloat16; code times scale is exact in float32
        found = found.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert digest(found) == expected


def test_there_are_checkpoints_of_every_library() -> None:
    assert {name.partition("-")[0] for name in NAMES} == {"awq", "ct", "gptq"}
    assert len(NAMES) >= 8
