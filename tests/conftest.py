"""Fixtures that several test modules share: an export costs seconds, so each happens once a session."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from compiler import pipeline
from compiler.frontend import load
from compiler.frontend.model import FloatModel
from passes.rewrite import Ledger

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny-qwen2"
TEXT = ROOT / "examples" / "text" / "evaluation.txt"


@pytest.fixture(scope="session")
def tiny_float() -> FloatModel:
    """The example model, exported and normalized. Copy the graph (`graph.copy()`) before a pass changes it."""
    model = load(TINY)
    pipeline.normalize(model.graph, Ledger())
    return model
