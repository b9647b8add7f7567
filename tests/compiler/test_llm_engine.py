"""LLM on an engine: the driver that serves it, on the stand-in for TensorRT and the GPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
from dataclasses import replace

import numpy as np
import pytest

from instantrt.compiler import llm as module
from instantrt.compiler.artifact.digest import sha256
from instantrt.compiler.artifact.manifest import Artifact, read_manifest, write_manifest
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.backend.tensorrt.gpu import Gpu, gpus
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.llm import LLM
from instantrt.compiler.serving.runtime import cuda
from instantrt.compiler.serving.runtime.onnx_engine import ConcatEngine
from instantrt.compiler.serving.runtime.text import Text
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.tensorrt.kv_in_place import kv_in_place
from tests.compiler.tensorrt_stand_in import LENGTH, Engine, HostDevice, Plan, stand_in
from tests.conftest import TINY

PROMPT = "The server receives a request"


@pytest.fixture(scope="module", params=["shared", "concat"])
def plan(request: pytest.FixtureRequest, tiny_float: FloatModel, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    graph = tiny_float.graph.copy()
    folder = tmp_path_factory.mktemp("out") / "sm89"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        shutil.copyfile(TINY / name, folder / name)
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
        engine={"builder": "tensorrt", "version": "10.13.0.35", "sm": 89, "options": {}},
        source={"model": "tiny"},
    )
    write_manifest(folder.parent, [artifact])
    return made


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def gpu(plan: Plan, device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine whose second GPU can run the engine; the ordinals that were opened."""
    opened: list[int] = []

    def open_device(ordinal: int) -> HostDevice:
        opened.append(ordinal)
        return device

    behind = Engine(plan.session, device.driver, plan.profiles)
    monkeypatch.setattr(module, "gpus", lambda: (Gpu("T4", 75), Gpu("L4", 89)))
    monkeypatch.setattr(cuda, "Device", open_device)
    monkeypatch.setattr(importlib, "import_module", lambda name: {"tensorrt": stand_in(behind)}[name])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"tensorrt": "10.13.0.35"}[name])
    return opened


@pytest.fixture(scope="module")
def expected(tiny_float: FloatModel, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What ONNX Runtime generates greedily until the cache is full."""
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    write_model(tiny_float.graph.copy(), path)
    engine, done, step, tokens = ConcatEngine(path, 1, LENGTH), 0, Text(TINY).encode(PROMPT), []
    while done < LENGTH - 1:
        logits = engine.prefill(0, np.array(step), done)
        logits[0] = -np.inf  # the end of text
        tokens.append(int(logits.argmax()))
        done, step = done + len(step), tokens[-1:]
    return tokens


def test_the_tokens_of_an_engine(plan: Plan, gpu: list[int], device: HostDevice, expected: list[int]) -> None:
    """Until enough, and until the cache is full; alone and together; and nothing stays on the GPU."""
    with LLM(plan.file.parent.parent) as llm:
        assert gpu == [1]
        for count in (1000, 7, 1):
            done = llm.generate(PROMPT, max_tokens=count, min_tokens=count)
            assert (list(done.tokens), done.finish) == (expected[:count], "length")
        both = llm.generate([PROMPT, "The list of", PROMPT], max_tokens=7, min_tokens=7)
        assert [both[i].tokens for i in (0, 2)] == [tuple(expected[:7])] * 2
        assert both[1].tokens != both[0].tokens
        with pytest.raises(UserError, match=f"expected: +at most {LENGTH - 1} tokens"):
            llm.generate("a b " * LENGTH)
        assert device.driver.blocks
    assert device.driver.blocks == {}
    assert device.driver.graphs == {}


@pytest.mark.usefixtures("gpu")
def test_an_engine_is_checked_before_it_is_loaded(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    out = plan.file.parent.parent
    (artifact,) = read_manifest(out)
    monkeypatch.setattr(module, "open_engine", lambda *a, **k: pytest.fail("loaded before it was checked"))
    for changed, words in (
        (replace(artifact, digests={"sm89/model.engine": "0"}), "this is not what compile wrote"),
        (replace(artifact, engine={**(artifact.engine or {}), "version": "1.2.3.4"}), "not the one that the manifest"),
        (replace(artifact, engine={**(artifact.engine or {}), "sm": 90}), "this machine: "),
        (replace(artifact, plugins=("../libevil.so",)), r"this is not what compile wrote\n.*a digest in its record"),
    ):
        monkeypatch.setattr(module, "find_artifact", lambda *a, changed=changed: changed)
        with pytest.raises(UserError, match=words):
            LLM(out).start()


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_cannot_be_loaded_is_a_users_error(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    out = plan.file.parent.parent
    (artifact,) = read_manifest(out)
    longer = replace(artifact, limits={**artifact.limits, "max_length": 65})
    monkeypatch.setattr(module, "find_artifact", lambda *a: longer)
    with pytest.raises(UserError, match=r"loading the model failed\n.*max_length: expected at most 64"):
        LLM(out).start()


def test_a_gpu_that_rtx_does_not_serve(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of TensorRT-RTX on an H200 is refused with the way out, one of full TensorRT without."""
    out = plan.file.parent.parent
    (artifact,) = read_manifest(out)
    for place in ("compiler.llm", "compiler.backend.tensorrt.gpu"):
        monkeypatch.setattr(f"instantrt.{place}.gpus", lambda: (Gpu("NVIDIA H200", 90),))
    for builder, fix in (
        ("tensorrt_rtx", "no engine of TensorRT-RTX loads on sm90; compile for sm90"),
        ("tensorrt", ""),
    ):
        changed = replace(artifact, engine={**(artifact.engine or {}), "builder": builder})
        monkeypatch.setattr(module, "find_artifact", lambda *a, changed=changed: changed)
        with pytest.raises(UserError, match="built for sm89") as caught:
            LLM(out).start()
        assert caught.value.fix.startswith(fix)
        assert bool(caught.value.fix) == bool(fix)


def test_without_its_gpu_an_engine_is_refused_in_words(plan: Plan) -> None:
    if gpus():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"built for sm89\n  found: +this machine: "):
        LLM(plan.file.parent.parent).generate(PROMPT)
