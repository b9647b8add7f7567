"""instantrt.tools.cli.generate on an engine: the driver that serves it, on the stand-in for TensorRT and the GPU."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import replace

import numpy as np
import pytest

from instantrt.compiler.artifact.manifest import Artifact, read_manifest, write_manifest
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.backend.tensorrt.gpu import Gpu
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.serving.runtime.engine import ConcatEngine
from instantrt.compiler.serving.runtime.integrity import sha256
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.tensorrt.kv_in_place import kv_in_place
from instantrt.tools import engine as tool
from instantrt.tools.cli.generate import open_model
from tests.compiler.tensorrt_stand_in import LENGTH, Engine, HostDevice, Plan, stand_in

PROMPT = [5, 17, 3, 900, 41]


@pytest.fixture(scope="module", params=["shared", "concat"])
def plan(request: pytest.FixtureRequest, tiny_float: FloatModel, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    graph = tiny_float.graph.copy()
    folder = tmp_path_factory.mktemp("out") / "sm89"
    folder.mkdir()
    made = Plan(run(graph, kv_in_place(LENGTH), PassLog()) if request.param == "shared" else graph, folder)
    artifact = Artifact(
        target="sm89",
        kind="engine",
        path="sm89/model.engine",
        inputs=(),
        outputs=(),
        quant={},
        llm={"layers": 4, "kv_heads": 2, "head_dim": 64, "vocab": 4096, "max_length": 1024},
        digests={"sm89/model.engine": sha256(made.file)},
        limits={"cache": request.param, "max_batch": 4, "max_length": LENGTH},
        engine={"builder": "tensorrt", "version": "10.13.0.35", "sm": 89},
        source={"model": "tiny"},
    )
    write_manifest(folder.parent, [artifact])
    return made


@pytest.fixture
def gpu(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine whose second GPU can run the engine; the ordinals that were opened."""
    opened: list[int] = []
    device = HostDevice()

    def open_device(ordinal: int) -> HostDevice:
        opened.append(ordinal)
        return device

    behind = Engine(plan.session, device.driver, plan.profiles)
    monkeypatch.setattr(tool, "gpus", lambda: (Gpu("T4", 75), Gpu("L4", 89)))
    monkeypatch.setattr(tool, "Device", open_device)
    monkeypatch.setattr(importlib, "import_module", lambda name: {"tensorrt": stand_in(behind)}[name])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"tensorrt": "10.13.0.35"}[name])
    return opened


@pytest.fixture(scope="module")
def expected(tiny_float: FloatModel, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What ONNX Runtime generates greedily until the cache is full."""
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    write_model(tiny_float.graph.copy(), path)
    engine, done, step, tokens = ConcatEngine(path, 1, LENGTH), 0, PROMPT, []
    while done < LENGTH:
        tokens.append(int(engine.prefill(0, np.array(step), done).argmax()))
        done, step = done + len(step), tokens[-1:]
    return tokens


def test_the_tokens_of_an_engine(plan: Plan, gpu: list[int], expected: list[int]) -> None:
    """Until enough, and until the cache is full; the next prompt starts anew."""
    model = open_model(plan.file.parent.parent, None)
    assert model.folder == plan.file.parent
    assert gpu == [1]

    def tokens(count: int) -> list[int]:
        return list(model.tokens(PROMPT, count, lambda logits: int(logits.argmax())))

    assert tokens(1000) == expected
    assert tokens(7) == expected[:7]
    assert tokens(1) == expected[:1]
    with pytest.raises(UserError, match=f"expected: +1 to {LENGTH - 1} tokens"):
        list(model.tokens([1] * LENGTH, 1, lambda logits: int(logits.argmax())))


@pytest.mark.usefixtures("gpu")
def test_an_engine_is_checked_before_it_is_loaded(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    out = plan.file.parent.parent
    (artifact,) = read_manifest(out)
    monkeypatch.setattr(tool, "open_engine", lambda *a: pytest.fail("loaded before it was checked"))
    for changed, words in (
        (replace(artifact, digests={"sm89/model.engine": "0"}), "has changed since compile wrote it"),
        (replace(artifact, engine={**(artifact.engine or {}), "version": "1.2.3.4"}), "not the one that the manifest"),
        (replace(artifact, engine={**(artifact.engine or {}), "sm": 90}), "this machine: "),
        (replace(artifact, plugins=("../libevil.so",)), "leads out of the folder"),
    ):
        with pytest.raises(UserError, match=words):
            tool.EngineModel(out, changed)


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_cannot_be_loaded_is_a_users_error(plan: Plan) -> None:
    out = plan.file.parent.parent
    (artifact,) = read_manifest(out)
    with pytest.raises(UserError, match=r"cannot be loaded\n.*max_length: expected at most 64"):
        tool.EngineModel(out, replace(artifact, limits={**artifact.limits, "max_length": 65}))
