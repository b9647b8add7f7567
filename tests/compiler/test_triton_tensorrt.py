"""The generate model's TensorRT driver against a stand-in for TensorRT: host memory, and ONNX Runtime as the engine.

What it shows: which shapes, addresses, profiles and types the driver hands over, and what it makes of the results.
What a GPU does with them is for the `trt` ring.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from compiler.backend.writer import write_model
from compiler.frontend.model import FloatModel
from compiler.triton.engine import ConcatEngine
from compiler.triton.tensorrt_engine import DECODE, PAST, PREFILL, TensorRTEngine, widened

TYPES = {"tensor(int64)": ("INT64", np.int64), "tensor(float)": ("FLOAT", np.float32)}
LENGTH = 64


class HostDevice:
    """Device memory that is the host's; every address must be one that was allocated."""

    stream = ctypes.c_void_p(7)

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}

    def enter(self) -> None:
        pass

    def allocate(self, size: int) -> int:
        block = np.full(size, 0xFF, np.uint8)  # NaN, if it is ever read unwritten
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, address: int) -> None:
        if address:
            del self.blocks[address]

    def view(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        base = max(start for start in self.blocks if start <= address)
        block = self.blocks[base][address - base :]
        return block[: int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)

    def upload(self, address: int, values: np.ndarray) -> None:
        self.view(address, values.shape, values.dtype)[...] = values

    def download(self, values: np.ndarray, address: int) -> None:
        values[...] = self.view(address, values.shape, values.dtype)


class Context:
    def __init__(self, session: ort.InferenceSession, device: HostDevice) -> None:
        self.session, self.device, self.profile = session, device, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        assert stream == self.device.stream.value
        self.profile = profile

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = tuple(shape)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "logits"
        return (*self.shapes["input_ids"], 4096)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.device.stream.value
        if self.profile == DECODE:
            assert self.shapes["input_ids"] == (1, 1)
            assert self.shapes[f"{PAST}0.key"][2] >= 1
        feeds = {
            i.name: self.device.view(self.addresses[i.name], self.shapes[i.name], TYPES[i.type][1])
            for i in self.session.get_inputs()
        }
        names = [o.name for o in self.session.get_outputs()]
        for name, value in zip(names, self.session.run(names, feeds), strict=True):
            self.device.view(self.addresses[name], value.shape, value.dtype)[...] = value
        return True


def stand_in(session: ort.InferenceSession, device: HostDevice) -> Any:
    """As much of the tensorrt module as the driver uses."""
    specs = {t.name: t for t in (*session.get_inputs(), *session.get_outputs())}
    engine = SimpleNamespace(
        num_io_tensors=len(specs),
        get_tensor_name=lambda i: list(specs)[i],
        get_tensor_shape=lambda name: tuple(d if isinstance(d, int) else -1 for d in specs[name].shape),
        get_tensor_dtype=lambda name: SimpleNamespace(name=TYPES[specs[name].type][0]),
        create_execution_context=lambda: Context(session, device),
    )

    class Logger:
        WARNING = 2

        def __init__(self, level: int) -> None:
            assert level == self.WARNING

    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if plan == b"plan" else None)
    return SimpleNamespace(Logger=Logger, Runtime=lambda logger: runtime)


@pytest.fixture(scope="module")
def onnx(tiny_float: FloatModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("engine") / "model.onnx"
    write_model(tiny_float.graph.copy(), path)
    path.with_name("model.engine").write_bytes(b"plan")
    return path


def test_rows_give_what_onnx_runtime_gives(onnx: Path) -> None:
    device = HostDevice()
    trt = stand_in(ort.InferenceSession(onnx), device)
    engines = (ConcatEngine(onnx, 3, LENGTH), TensorRTEngine(onnx.with_name("model.engine"), trt, device, LENGTH))  # type: ignore[arg-type]
    texts = np.random.default_rng(0).integers(1, 4000, (2, 40))
    seen = []
    for engine in engines:
        out = [engine.prefill(0, texts[0, :9], 0), engine.prefill(1, texts[1, :20], 0)]
        out.append(engine.prefill(1, texts[1, 20:25], 20))
        for step in range(3):
            out += list(engine.decode(texts[[0, 1], [9 + step, 25 + step]], np.array([9, 25]) + step))
        engine.move(1, 0, 28)
        out += list(engine.decode(texts[[1], [28]], np.array([28])))
        out.append(engine.prefill(1, texts[0, :1], 0))  # a prompt of one token, in a row used before
        seen.append(np.array(out))
    assert np.isfinite(seen[1]).all()
    np.testing.assert_array_equal(*seen)
    assert engines[1].contexts[PREFILL].profile == PREFILL
    caches = 2 * 2 * 8
    assert len(device.blocks) == caches + 4  # rows x (past, present) x parts; three inputs and the logits


def test_an_engine_of_another_version_is_refused(onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "model.engine").write_bytes(b"other")
    device = HostDevice()
    with pytest.raises(RuntimeError, match="cannot read the engine"):
        TensorRTEngine(tmp_path / "model.engine", stand_in(ort.InferenceSession(onnx), device), device, LENGTH)  # type: ignore[arg-type]


def test_bfloat16_logits_become_float32() -> None:
    values = np.array([1.0, -2.5, 3.140625], np.float32)
    assert widened((values.view(np.uint32) >> 16).astype(np.uint16)).tolist() == values.tolist()
    assert widened(np.array([0.5], np.float16)).dtype == np.float32
