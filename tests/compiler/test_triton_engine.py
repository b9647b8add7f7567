"""The generate model's two engines against each other: GroupQueryAttention in place, standard attention row by row."""

from __future__ import annotations

import importlib
import json
import mmap
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.serving.config import parameters
from instantrt.compiler.serving.runtime.cpus import quota, usable_cpus
from instantrt.compiler.serving.runtime.onnx_engine import ENGINES, ConcatEngine, SharedEngine, open_session, zeros
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.ort.attention import attention
from tests.repositories import write_repository

Engines = tuple[SharedEngine | ConcatEngine, ...]


@pytest.fixture(scope="module")
def engines(tiny_float: FloatModel, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    folder: Path = tmp_path_factory.mktemp("engines")
    standard, lowered = tiny_float.graph.copy(), tiny_float.graph.copy()
    run(lowered, attention(), PassLog())
    write_model(standard, folder / "concat.onnx")
    write_model(lowered, folder / "shared.onnx")
    return tuple(ENGINES[kind](folder / f"{kind}.onnx", 3, 64) for kind in ("concat", "shared"))


def test_rows_join_grow_and_move(engines: Engines) -> None:
    """A prompt in one piece and one in two; steps of both; a third joins; the first leaves, the last takes its row."""
    random = np.random.default_rng(0)
    texts = random.integers(1, 4000, (3, 40))
    seen: list[list[np.ndarray]] = []
    for engine in engines:
        out = [
            engine.prefill(0, texts[0, :9], 0),
            engine.prefill(1, texts[1, :20], 0),
            engine.prefill(1, texts[1, 20:25], 20),
        ]
        for step in range(3):
            out += list(engine.decode(texts[[0, 1], [9 + step, 25 + step]], np.array([9, 25]) + step).copy())
        out.append(engine.prefill(2, texts[2, :2], 0))
        out += list(engine.decode(texts[[0, 1, 2], [12, 28, 2]], np.array([12, 28, 2])).copy())
        engine.move(2, 0, 3)
        for step in range(3):
            out += list(engine.decode(texts[[2, 1], [3 + step, 29 + step]], np.array([3, 29]) + step).copy())
        out.append(engine.prefill(2, texts[0, :4], 0))  # the row is taken again: nothing of its past shows
        seen.append(out)
    expected, got = np.array(seen)
    assert expected.shape == (3 + 6 + 1 + 3 + 6 + 1, 4096)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_sessions_of_one_file_are_one(tiny_compiled: Path, tmp_path: Path) -> None:
    """With its packed weights; another file, the same one after it was replaced, or other threads are another."""
    model = tmp_path / "model.onnx"
    for file in (tiny_compiled / "x86").glob("model.onnx*"):
        shutil.copy(file, tmp_path)
    first, second = (SharedEngine(model, rows, 32, threads=1) for rows in (1, 2))
    assert first.session is second.session
    text = np.arange(1, 9)
    np.testing.assert_array_equal(first.prefill(0, text, 0), second.prefill(1, text, 0))
    assert open_session(model, threads=1) is first.session
    assert open_session(model, threads=2) is not first.session
    shutil.copy(tiny_compiled / "x86/model.onnx", tmp_path / "new")
    (tmp_path / "new").replace(model)
    assert open_session(model, threads=1) is not first.session


@pytest.mark.parametrize(
    ("threads", "spinning", "spins"),
    [(1, None, "1"), (usable_cpus() + 1, None, "0"), (1, False, "0"), (usable_cpus() + 1, True, "1"), (0, None, "1")],
)
def test_threads_spin_where_each_has_a_cpu(
    tiny_compiled: Path, threads: int, spinning: bool | None, spins: str
) -> None:
    session = open_session(tiny_compiled / "x86/model.onnx", threads=threads, spinning=spinning)
    assert session.get_session_options().get_session_config_entry("session.intra_op.allow_spinning") == spins


def test_in_triton_threads_do_not_spin(tiny_compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the parameter in config.pbtxt, which the server hands to the model as JSON, says so."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace())
    model = importlib.import_module("instantrt.compiler.serving.runtime.model")
    (served,) = write_repository(tiny_compiled, tmp_path)
    monkeypatch.setattr(model, "__file__", str(tmp_path / served.models[1] / "1/model.py"))
    for given, spins in ({}, "0"), ({"spinning": "true"}, "1"):
        values = parameters(served.artifact) | given
        config = {"parameters": {name: {"string_value": str(value)} for name, value in values.items()}}
        triton = model.TritonPythonModel()
        triton.initialize({"model_config": json.dumps(config), "model_instance_device_id": "0"})
        options = triton.scheduler.engine.session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == spins
        triton.finalize()


@pytest.mark.parametrize(
    ("limits", "cpus"),
    [
        ({}, float("inf")),
        ({"": "max 100000"}, float("inf")),
        ({"a/b": "150000 100000"}, 1.5),
        ({"a/b": "max 100000", "a": "200000 100000", "": "max 100000"}, 2),
        ({"a/c": "100000 100000"}, float("inf")),
    ],
    ids=["no file", "no limit", "own", "above", "beside"],
)
def test_the_quota_of_the_group_and_of_those_above_it(tmp_path: Path, limits: dict[str, str], cpus: float) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/c").mkdir()
    for group, limit in limits.items():
        (tmp_path / group / "cpu.max").write_text(f"{limit}\n")
    own = tmp_path / "cgroup"
    own.write_text("1:cpu:/elsewhere\n0::/a/b\n")
    assert quota(tmp_path, own) == cpus


def test_a_cache_takes_memory_as_it_is_written() -> None:
    """The first token of each of 64 rows takes a page, not the 2 MiB that NumPy would have the system give."""
    before = resident()
    cache = zeros((64, 1 << 19), np.float32)
    cache[:, 0] = 1
    assert resident() - before < 8 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * mmap.PAGESIZE
