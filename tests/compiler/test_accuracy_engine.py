"""The engine as a form: which module runs it, what is handed over, and every way it cannot be run, in words.

A stand-in for TensorRT, with host memory and ONNX Runtime as the engine; what a GPU does is for the `trt` ring.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from instantrt.compiler.accuracy.bounds import FLOAT32
from instantrt.compiler.accuracy.engine_runner import EngineRunner
from instantrt.compiler.accuracy.subjects import subjects
from instantrt.compiler.artifact.manifest import read_manifest
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.backend.tensorrt.gpu import gpus
from instantrt.compiler.backend.tensorrt.header import HEADER
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.request import Request
from instantrt.compiler.smoke.compare import distances
from instantrt.compiler.smoke.lockstep import lockstep
from instantrt.compiler.smoke.on_gpu import engine_answers
from instantrt.compiler.smoke.steps import llm_steps
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.qdq.last_logits import LastLogits
from tests.compiler.tensorrt_stand_in import TYPES, HostDevice
from tests.conftest import TINY, planned_and_written

LONGEST = 12


def engine_file(path: Path, magic: bytes = b"vtrt", version: tuple[int, ...] = (1, 7, 1, 116)) -> Path:
    """A file with the header of an engine, and nothing behind it."""
    path.write_bytes(HEADER.pack(magic, HEADER.size, *version))
    return path


class Context:
    """Accepts sequences of at most LONGEST tokens; runs what lies at the addresses it was told."""

    def __init__(self, session: ort.InferenceSession, device: HostDevice) -> None:
        self.session, self.device = session, device
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name not in self.shapes or name in self.addresses
        self.shapes[name] = shape
        return max(shape[1:2]) <= LONGEST

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def view(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.device.driver.bytes_at(self.addresses[name], size).view(dtype).reshape(shape)

    def outputs(self) -> dict[str, np.ndarray]:
        feeds = {i.name: self.view(i.name, self.shapes[i.name], TYPES[i.type][1]) for i in self.session.get_inputs()}
        names = [o.name for o in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, feeds), strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.outputs()[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.device.stream.value
        for name, value in self.outputs().items():
            self.view(name, value.shape, value.dtype)[...] = value
        return True


def stand_in(onnx: Path, device: HostDevice, *, loads: bool = True) -> Any:
    """As much of the module as the runner uses."""
    session = ort.InferenceSession(onnx)
    inputs = {t.name: t for t in session.get_inputs()}
    specs = {**inputs, **{t.name: t for t in session.get_outputs()}}
    engine = SimpleNamespace(
        num_io_tensors=len(specs),
        get_tensor_name=lambda i: list(specs)[i],
        get_tensor_mode=lambda name: "in" if name in inputs else "out",
        get_tensor_shape=lambda name: tuple(d if isinstance(d, int) else -1 for d in specs[name].shape),
        get_tensor_dtype=lambda name: SimpleNamespace(name=TYPES[specs[name].type][0]),
        get_tensor_profile_shape=lambda name, profile: ((1, 1), (1, 4), (1, LONGEST)),
        create_execution_context=lambda: Context(session, device),
    )
    return SimpleNamespace(
        __version__="1.7.1.116",
        TensorIOMode=SimpleNamespace(INPUT="in"),
        Logger=type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None}),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if loads else None),
    )


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def runner(tiny_float: FloatModel, device: HostDevice, tmp_path: Path) -> Callable[..., EngineRunner]:
    def make(*, last: bool = False, loads: bool = True, open_device: Any = None) -> EngineRunner:
        graph = tiny_float.graph.copy()
        write_model(run(graph, [LastLogits()], PassLog()) if last else graph, tmp_path / "model.onnx")
        module = stand_in(tmp_path / "model.onnx", device, loads=loads)
        path = engine_file(tmp_path / "model.engine")
        opened = open_device or (lambda ordinal: device)
        return EngineRunner(path, (), ["logits"], module=module, device=opened)

    return make


def feeds(length: int = 7) -> dict[str, np.ndarray]:
    """Two sequences on an empty cache; the types are those of a graph in another precision, which the runner casts."""
    names = [f"past_key_values.{i}.{part}" for i in range(4) for part in ("key", "value")]
    return {
        "input_ids": np.random.default_rng(0).integers(0, 4000, (2, length)),
        "attention_mask": np.ones((2, length), np.int64),
        "position_ids": np.tile(np.arange(length), (2, 1)),
        **dict.fromkeys(names, np.zeros((2, 2, 0, 64), np.float16)),
    }


def test_it_gives_what_its_engine_gives_and_keeps_no_memory(
    runner: Callable[..., EngineRunner], device: HostDevice, tmp_path: Path
) -> None:
    with runner() as active:
        got = active(feeds())
    cast = {name: v.astype(np.float32) if v.dtype == np.float16 else v for name, v in feeds().items()}
    (want,) = ort.InferenceSession(tmp_path / "model.onnx").run(["logits"], cast)
    assert list(got) == ["logits"]
    np.testing.assert_allclose(got["logits"], want, rtol=1e-4, atol=1e-4)
    assert device.driver.blocks == {}


def test_a_text_longer_than_the_profile_is_an_error(runner: Callable[..., EngineRunner], device: HostDevice) -> None:
    with runner() as active, pytest.raises(UserError, match="does not take this shape of input_ids") as caught:
        active(feeds(LONGEST + 1))
    assert (caught.value.expected, caught.value.found) == ("[1, 1] to [1, 12]", "[1, 13]")
    assert device.driver.blocks == {}


def test_logits_of_the_last_token_cannot_be_compared(runner: Callable[..., EngineRunner]) -> None:
    with runner(last=True) as active, pytest.raises(UserError, match="the logits of the last token alone") as caught:
        active(feeds())
    assert "--logits all" in caught.value.fix


def test_an_engine_runs_every_step_of_the_smoke_run(
    runner: Callable[..., EngineRunner], tiny_float: FloatModel, device: HostDevice
) -> None:
    """With a cache from step to step, rows padded on the left, and the logits of the last token alone."""
    assert tiny_float.llm is not None
    steps = llm_steps(tiny_float.graph, tiny_float.llm, right=False)
    expected = lockstep(tiny_float.graph, steps)
    engine = runner(last=True)
    engine.every_position, engine.outputs = False, [t.name for t in tiny_float.graph.outputs]
    found = engine_answers(engine, steps)
    assert found.keys() == expected.keys()
    assert found["prefill"]["logits"].shape[1] == 1
    assert all(each.within(FLOAT32.model) for each in distances(found, expected, steps))
    assert device.driver.blocks == {}


def test_an_engine_of_another_version_or_gpu_is_an_error(runner: Callable[..., EngineRunner]) -> None:
    with pytest.raises(UserError, match=r"cannot be loaded here\n  expected: TensorRT-RTX 1\.7\.1\.116 and the GPU"):
        runner(loads=False).__enter__()


def no_driver(ordinal: int) -> HostDevice:  # noqa: ARG001
    raise OSError("libcuda.so.1: cannot open shared object file")


def test_no_gpu_is_an_error(runner: Callable[..., EngineRunner]) -> None:
    with pytest.raises(UserError, match=r"an engine runs on a GPU\n  found:.*libcuda") as caught:
        runner(open_device=no_driver).__enter__()
    assert "--forms float,twin,lowered" in caught.value.fix


def test_the_module_is_the_one_that_the_header_names(tmp_path: Path) -> None:
    runner = EngineRunner(engine_file(tmp_path / "m.engine"), (), ["y"])
    assert runner.module.__name__ == "tensorrt_rtx"
    if not gpus():
        with pytest.raises(UserError, match="an engine runs on a GPU"):
            runner.__enter__()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="full TensorRT is installed")
def test_a_module_that_is_missing_is_named(tmp_path: Path) -> None:
    path = engine_file(tmp_path / "m.engine", b"ftrt", (10, 16, 1, 11))
    with pytest.raises(UserError, match=r"runs with TensorRT 10\.16\.1\.11 on a GPU, which this Python lacks"):
        EngineRunner(path, (), ["y"])


def test_a_foreign_file_is_not_opened_further(tmp_path: Path) -> None:
    (tmp_path / "m.engine").write_bytes(b"#!/bin/sh\n")
    with pytest.raises(UserError, match="not a TensorRT engine"):
        EngineRunner(tmp_path / "m.engine", (), ["y"])


@pytest.mark.slow
def test_a_damaged_engine_is_found_before_it_becomes_a_form(tmp_path: Path) -> None:
    request = Request(TINY, ("sm89",), tmp_path / "out", quant="a16w4", builder="tensorrt-rtx")
    planned = planned_and_written(request)
    (subject,) = subjects(planned, request, read_manifest(request.out))
    assert subject.file == request.out / "sm89" / "model.engine"
    data = bytearray(subject.file.read_bytes())
    data[-1] ^= 1
    subject.file.write_bytes(data)
    with pytest.raises(UserError, match="this is not what compile wrote"):
        subjects(planned, request, read_manifest(request.out))
