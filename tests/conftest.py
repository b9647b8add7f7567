"""Fixtures that several test modules share: an export costs seconds, so each happens once a session."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from instantrt.compiler import build, pipeline
from instantrt.compiler.build import Plan, compile_model, compile_planned, plan
from instantrt.compiler.frontend import load
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.request import Request
from instantrt.passes.core.rewrite import PassLog

# A test run started in the background inherits an ignored interrupt, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny-qwen2"
TEXT = ROOT / "examples" / "text" / "evaluation.txt"


def planned_and_written(request: Request) -> Plan:
    """As `compile_model`, for who wants to see the plan."""
    planned = plan(request)
    compile_planned(request, planned)
    return planned


@pytest.fixture(scope="session")
def tiny_float() -> FloatModel:
    """The example model, exported and normalized. Copy the graph (`graph.copy()`) before a pass changes it."""
    model = load(TINY)
    pipeline.normalize(model.graph, PassLog())
    return model


@pytest.fixture
def no_export(tiny_float: FloatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilations of the example start from its one export."""
    monkeypatch.setattr(build, "load", lambda *a, **k: replace(tiny_float, graph=tiny_float.graph.copy()))


@pytest.fixture(scope="session")
def tiny_compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the example model, compiled for x86 with 8-bit weights."""
    out = tmp_path_factory.mktemp("tiny") / "out"
    compile_model(Request(model=TINY, targets=("x86",), out=out, quant="a16w8"))
    return out
