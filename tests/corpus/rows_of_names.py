"""Heads, layers and schemes that only a name tells apart; and what the libraries below us raise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.corpus.row import Row
from tests.models import make


def family(name: str, **fields: Any) -> Callable[[Path], Path]:
    """A float checkpoint of one layer."""

    def write(folder: Path) -> Path:
        make(name, folder, **{"num_hidden_layers": 1, **fields})
        return folder

    return write


def config_of(**fields: Any) -> Callable[[Path], Path]:
    """A checkpoint with one layer of llama, whose config.json says something else."""

    def write(folder: Path) -> Path:
        make("llama", folder, num_hidden_layers=1)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return folder

    return write


ROWS = (
    Row("a vocabulary as wide as the hidden size", "identity", family("llama", vocab_size=64)),
    Row(
        "GPTQ of 3 bits",
        "refusals",
        config_of(quantization_config={"quant_method": "gptq", "bits": 3, "group_size": 32}),
        refused="GPTQ bits",
    ),
)
