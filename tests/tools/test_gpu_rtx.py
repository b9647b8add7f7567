"""The test of TensorRT-RTX engines on a GPU, as far as a CPU goes: engines built, and a stand-in that runs them."""

# ruff: noqa: ARG002  (the arguments are TensorRT's)
from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from instantrt.compiler.backend.tensorrt.build import read_header
from instantrt.compiler.backend.tensorrt.child import Refused
from instantrt.compiler.backend.tensorrt.gpu import Gpu
from instantrt.compiler.frontend.model import FloatModel
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.tensorrt.kv_in_place import kv_in_place
from instantrt.tools.bench.synthetic import QWEN2, write_checkpoint
from instantrt.tools.gpu import rtx as gpu_rtx
from instantrt.tools.gpu import rtx_prepare, rtx_speed
from instantrt.tools.gpu.rtx_prepare import Variant
from tests.compiler.tensorrt_stand_in import LENGTH, HostDevice, Plan
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One engine, unpacked."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("rtx")
    rtx_prepare.prepare(folder, (Variant("a16w4", 128, (89,)),))
    with tarfile.open(folder / rtx_prepare.ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_names_tell_variants_apart() -> None:
    names = [variant.name for variant in rtx_prepare.VARIANTS]
    assert len(set(names)) == len(names)
    assert {"a16w4-g128-default", "a8w8-default", "a16w4-g128-sm120"} <= set(names)


@pytest.mark.slow
def test_engines_and_what_they_should_compute(prepared: Path) -> None:
    engines = sorted(path.stem for path in prepared.glob("*.engine"))
    assert engines == ["a16w4-g128-sm89"]
    assert {read_header(prepared / f"{name}.engine").flavour for name in engines} == {"tensorrt_rtx"}
    arrays = dict(np.load(prepared / "a16w4-g128.npz"))
    given, wanted = (gpu_rtx.part(arrays, f"decode/{side}/") for side in ("in", "out"))
    assert given["input_ids"].shape == (1, 1)
    assert given["past_key_values.0.key"].shape[2] == rtx_prepare.TOKENS
    assert wanted["present.0.key"].shape[2] == rtx_prepare.TOKENS + 1
    assert wanted["logits"].shape[:2] == (1, 1)
    past = gpu_rtx.part(arrays, "prefill/out/")["present.3.value"]
    np.testing.assert_array_equal(wanted["present.3.value"][:, :, :-1], past)
    assert (prepared / rtx_prepare.ARCHIVE).stat().st_size < 9e6


@pytest.mark.slow
def test_an_engine_that_cannot_be_loaded_says_why(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What TensorRT-RTX itself says here, where there is no GPU."""
    gpu_rtx.one(prepared, "load", "a16w4-g128-sm89")
    start, end = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line)
    assert start == {"start": "load a16w4-g128-sm89"}
    if end["data"]["gpu"] != "no NVIDIA GPU":
        pytest.skip("this machine has a GPU: run instantrt.tools.gpu.rtx itself")
    assert (end["outcome"], end["data"]["loaded"]) == ("failed", False)
    assert "EngineValidity.INVALID" in end["message"]
    assert "CUDA driver version is insufficient" in "".join(end["data"]["said"])


@pytest.mark.slow
def test_a_gpu_that_is_not_served_costs_one_engine(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before anything is tried, and what the runtime says of one engine is kept."""
    monkeypatch.setattr(gpu_rtx, "gpus", lambda: (Gpu("NVIDIA H200", 90),))
    monkeypatch.setattr(gpu_rtx, "describe", lambda: "NVIDIA H200 (sm90)")
    monkeypatch.setattr("instantrt.compiler.backend.tensorrt.gpu.gpus", gpu_rtx.gpus)
    assert not gpu_rtx.run(prepared, tmp_path / "rtx.json")
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("NVIDIA H200 (sm90): no engine of TensorRT-RTX loads on sm90; compile for sm90 instead")
    report = json.loads((tmp_path / "rtx.json").read_text())
    assert report["not_served"].startswith("no engine of TensorRT-RTX loads on sm90")
    assert list(report["engines"]) == ["load a16w4-g128-sm89"]
    assert "not loaded" in report["engines"]["load a16w4-g128-sm89"]["message"]


@pytest.mark.slow
def test_a_model_that_travelled_is_built_again(prepared: Path) -> None:
    trt, said = gpu_rtx.runtime_module(), list[str]()
    ranges = json.loads((prepared / "a16w4-g128.json").read_text())["profiles"]
    path = prepared / "again.engine"
    path.write_bytes(gpu_rtx.build_here(trt, prepared / "a16w4-g128.onnx", ranges, "default", (), said))
    assert read_header(path).flavour == "tensorrt_rtx"
    assert gpu_rtx.steps(prepared, "build") == ["a16w4-g128-default", "a16w4-g128-current"]
    bad = [{**ranges[0], "input_ids": [[1, 1], [1, 64], [0, 32]]}]
    with pytest.raises((Refused, RuntimeError)):
        gpu_rtx.build_here(trt, prepared / "a16w4-g128.onnx", bad, "default", (), said)


@pytest.mark.slow
def test_tokens_beside_the_cpu_artifact(prepared: Path) -> None:
    """An engine that says the same, and one that leaves the way at the third token."""
    arrays = dict(np.load(prepared / "a16w4-g128.npz"))
    assert [len(arrays[f"tokens/{n}"]) for n in range(3)] == 3 * [rtx_prepare.GREEDY]

    class Reader:
        """Says what it is to say after each prompt."""

        def __init__(self, wrong: int) -> None:
            self.wrong, self.said = wrong, 0

        def logits(self, token: int) -> np.ndarray:
            self.said += 1
            logits = np.zeros(5000, np.float32)
            logits[token + (self.said - 1 == self.wrong)] = 1
            return logits

        def prefill(self, row: int, ids: np.ndarray, done: int) -> np.ndarray:
            (number,) = [n for n in range(3) if len(arrays[f"prompt/{n}"]) == len(ids)]
            self.wanted, self.start, self.said = arrays[f"tokens/{number}"], len(ids), 0
            return self.logits(self.wanted[0])

        def decode(self, ids: np.ndarray, done: np.ndarray) -> np.ndarray:
            return self.logits(self.wanted[min(int(done[0]) - self.start + 1, rtx_prepare.GREEDY - 1)])[None]

        def close(self) -> None:
            pass

    assert [r["equal"] for r in gpu_rtx.generated(Reader(-1), arrays)] == 3 * [rtx_prepare.GREEDY]
    assert [r["equal"] for r in gpu_rtx.generated(Reader(2), arrays)] == 3 * [2]


@pytest.mark.slow
def test_an_outline_is_filled(tmp_path: Path) -> None:
    """The small constants are the model's own, the others of their types; the builder takes the result."""
    pytest.importorskip("tensorrt_rtx")
    config = {
        **QWEN2, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 500,
    }  # fmt: skip
    write_checkpoint(tmp_path / "model", config)
    rtx_prepare.outline_mode(tmp_path, tmp_path / "model", Variant("a16w4", 128))
    name = "qwen2-1.5b-a16w4-g128"
    assert gpu_rtx.steps(tmp_path, "speed") == gpu_rtx.steps(tmp_path, "make") == [name]
    assert not list(tmp_path.glob("*.data"))
    trt, data = gpu_rtx.runtime_module(), dict[str, Any]()
    gpu_rtx.make_step(trt, tmp_path, name, data)
    assert read_header(tmp_path / f"{name}.plan").flavour == "tensorrt_rtx"
    assert data["weights_bytes"] > 2 * 500 * 128 * 2
    rtx_speed.fill(tmp_path / f"{name}.onnx")
    model = onnx.load(tmp_path / f"{name}.onnx")
    scales = {node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    values = {t.name: numpy_helper.to_array(t).astype(np.float32) for t in model.graph.initializer if t.name in scales}
    assert values
    assert all(((v > 0) & (v < 0.1)).all() for v in values.values())


def test_torch_beside_it() -> None:
    """One token on a static cache that a prompt has filled, against all at once."""
    torch = pytest.importorskip("torch")
    config = {
        **QWEN2, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 500,
    }  # fmt: skip
    other = rtx_speed.Torch(config, "cpu")
    ids = torch.randint(0, 500, (1, 65))
    with torch.inference_mode():
        other.forward(cache := other.cache(), ids[:, :64], 0)
        got, want = other.forward(cache, ids[:, 64:], 64), other.model(ids, logits_to_keep=1).logits
    torch.testing.assert_close(got, want, rtol=0.01, atol=1e-3)


@pytest.mark.slow
def test_a_contest_on_the_stand_in(tiny_float: FloatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one and of several rows run in both ways, and every time is said with its tokens."""
    for name, value in {"ROWS": (1, 4), "PAST": 16, "ROUNDS": 2, "STEPS": 3}.items():
        monkeypatch.setattr(rtx_speed, name, value)
    plan = Plan(run(tiny_float.graph.copy(), kv_in_place(LENGTH), PassLog()), tmp_path)
    engine = plan.open(rtx=True).engine
    times = rtx_speed.contest(engine, None)
    assert set(times) == {"prefill engine", *(f"{k} {n} engine" for k in ("step", "decode") for n in (1, 4))}
    for name, tokens in {"prefill engine": 16, "step 1 engine": 1, "decode 4 engine": 4}.items():
        assert len(times[name]["ms_of_all"]) == 2
        assert times[name]["tokens_per_second"] == pytest.approx(1e3 * tokens / times[name]["ms"], rel=0.01)


def test_what_loading_an_engine_needs() -> None:
    """docs/gpu.md names every package that has to be on the GPU machine."""
    (said,) = re.findall(r"`load` needs ([\w, ]+), the\s+driver", (ROOT / "docs" / "gpu.md").read_text())
    code = "import sys; before = {*sys.modules}; import instantrt.tools.gpu.rtx; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names
    assert {*said.split(", "), "instantrt"} == packages


def test_run_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "instantrt", "gpu-check", "rtx", "run", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(("no GPU: the driver library", "there is no"))


class Doubler:
    """An engine of one input, and its context: y = 2 x, of bfloat16."""

    def __init__(self, device: HostDevice) -> None:
        self.device = device
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.profile = -1

    def create_execution_context(self) -> Doubler:
        return self

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="BF16")

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        self.profile = profile

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] < 3

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        size = 2 * int(np.prod(self.shape))
        x, y = (self.device.driver.bytes_at(self.addresses[n], size).view(ml_dtypes.bfloat16) for n in "xy")
        y[...] = 2 * x
        return True


def test_execution() -> None:
    device = HostDevice()
    engine, x = Doubler(device), np.linspace(-3, 3, 14, dtype=np.float32).reshape(2, 7)
    got = gpu_rtx.execute(engine, device, 1, {"x": x}, ["y"])
    np.testing.assert_array_equal(got["y"], 2 * x.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert engine.profile == 1
    with pytest.raises(RuntimeError, match=r"not built for x of shape \(3, 7\)"):
        gpu_rtx.execute(engine, device, 0, {"x": np.zeros((3, 7), np.float32)}, ["y"])


def test_types_and_errors() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    rounded = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(gpu_rtx.as_type(values, "BF16"), rounded.view(np.uint16))
    assert gpu_rtx.as_type(values, "HALF").dtype == np.float16
    want = {"logits": values, "present.0.key": values, "present.0.value": values}
    got = {"logits": 1.01 * values, "present.0.key": values, "present.0.value": 1.1 * values}
    errors = gpu_rtx.compared(got, want)
    assert errors == pytest.approx({"logits": 0.01, "caches": 0.1}, rel=1e-3)
    assert gpu_rtx.compared({**got, "logits": values * np.nan}, want)["logits"] == np.inf
