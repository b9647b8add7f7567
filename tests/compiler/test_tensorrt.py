"""The builder process: engines really built by TensorRT-RTX, and everything that can go wrong on the way."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from instantrt.compiler.backend.tensorrt import build as tensorrt
from instantrt.compiler.backend.tensorrt.build import EngineSpec, build, read_header
from instantrt.compiler.backend.tensorrt.fusion import Read, weight_reads
from instantrt.compiler.options import EngineOptions
from instantrt.passes.core.errors import UserError

K, N = 64, 32
RANGE = {"x": ((1, 1, K), (1, 16, K), (2, 32, K))}


def model(path: Path, nodes: list[onnx.NodeProto] | None = None, **constants: np.ndarray) -> Path:
    """x [b, s, 64] float16 -> y; by default y = x @ DequantizeLinear(codes, scale), int8 by channel."""
    if nodes is None:
        rng = np.random.default_rng(0)
        constants = {
            "codes": rng.integers(-128, 128, (K, N)).astype(np.int8),
            "scale": rng.uniform(0.01, 0.02, N).astype(np.float16),
        }
        nodes = [
            helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], name="l/weight", axis=1),
            helper.make_node("MatMul", ["x", "w"], ["y"], name="l"),
        ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["b", "s", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


@pytest.fixture
def spec(tmp_path: Path) -> EngineSpec:
    onnx_path = model(tmp_path / "model.onnx")
    out = tmp_path / "out"
    return EngineSpec("tensorrt_rtx", onnx_path, out / "m.engine", out / "m.layers.txt", (RANGE,), (89,))


def left(spec: EngineSpec) -> list[str]:
    return sorted(p.name for p in spec.engine.parent.iterdir()) if spec.engine.parent.exists() else []


def test_an_engine_its_header_and_its_layers(spec: EngineSpec) -> None:
    built = build(spec)
    assert left(spec) == ["m.engine", "m.layers.txt"]
    assert built.bytes == spec.engine.stat().st_size
    assert read_header(spec.engine) == ("tensorrt_rtx", built.version, built.bytes)
    (weight,) = weight_reads(built.layers.read_text("utf-8"), ["l"])
    assert (weight.read, weight.dtype) == (Read.FUSED, "Int8")


def test_the_same_file_gives_an_engine_of_the_same_size_for_several_sms(spec: EngineSpec) -> None:
    one, three = build(spec), build(replace(spec, sms=(86, 89, 120)))
    assert abs(three.bytes - one.bytes) < 4096


def test_progress_only_grows_and_names_phases(spec: EngineSpec) -> None:
    seen: list[tuple[float, str]] = []
    build(spec, lambda fraction, phase: seen.append((fraction, phase)))
    assert seen
    assert all(0 <= fraction <= 1 and phase for fraction, phase in seen)
    assert seen == sorted(seen, key=lambda each: each[0])


def test_all_refused_nodes_are_named_at_once(spec: EngineSpec) -> None:
    nodes = [
        helper.make_node("MatMulInteger", ["codes", "codes"], ["a"], name="first"),
        helper.make_node("StringNormalizer", ["x"], ["b"], name="second"),
        helper.make_node("Sharpen", ["x"], ["y"], name="third", domain="shop"),
    ]
    model(spec.onnx, nodes, codes=np.ones((4, 4), np.int8))
    with pytest.raises(UserError) as caught:
        build(spec)
    for name, op in (("first", "MatMulInteger"), ("second", "StringNormalizer"), ("third", "Sharpen")):
        assert f"{name} ({op}): TensorRT has no such operation" in caught.value.found
    assert left(spec) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sms": (90,)}, "does not build for sm90"),
        ({"profiles": ()}, "no optimization profile"),
        ({"options": EngineOptions(version_compatible=True)}, "no version-compatible"),
        ({"flavour": "tensorrt"}, "TensorRT is not installed"),
        ({"onnx": Path("nowhere.onnx")}, "not there"),
    ],
    ids=["sm", "profile", "compatible", "flavour", "file"],
)
def test_what_the_builder_cannot_do_is_said_and_leaves_nothing(spec: EngineSpec, change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(replace(spec, **change))
    assert left(spec) == []


def test_a_profile_that_contradicts_itself_is_refused_before_any_work(spec: EngineSpec) -> None:
    with pytest.raises(UserError, match="profile 0: the profile contradicts itself at input x"):
        replace(spec, profiles=({"x": ((1, 8, K), (1, 4, K), (1, 16, K))},))


def test_int4_is_refused_for_turing_in_the_builders_words(spec: EngineSpec) -> None:
    codes = onnx.TensorProto(name="codes", data_type=TensorProto.INT4, dims=(K, N), raw_data=bytes(K * N // 2))
    nodes = [
        helper.make_node("Constant", [], ["q"], name="codes", value=codes),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], name="l/weight", axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="l"),
    ]
    model(spec.onnx, nodes, scale=np.ones((K // 32, N), np.float16))
    with pytest.raises(UserError, match="HW-specific datatypes: int4"):
        build(replace(spec, sms=(75,)))
    build(replace(spec, sms=(80,)))


def test_a_full_disk_is_an_error_and_leaves_nothing(spec: EngineSpec) -> None:
    """The builder itself ignores a failed write and reports success. A limit on file size stands for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match="the engine could not be written"):
            build(spec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left(spec) == []


@pytest.fixture
def small_disk(spec: EngineSpec) -> Iterator[Path]:
    """The output folder on a disk of its own, with 16 KB: the plan fits, and not much more."""
    folder = spec.engine.parent
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_after_the_plan_is_an_error_too(spec: EngineSpec, small_disk: Path) -> None:
    """The table of layers meets a file that takes all that the plan left."""
    plan = build(replace(spec, engine=spec.onnx.with_name("m.engine"), layers=spec.onnx.with_name("l.txt"))).bytes
    pages = -(-plan // 4096)
    subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"could not read or write a file[^$]*No space left on device"):
        build(spec)
    assert left(spec) == []


@pytest.mark.parametrize(
    ("name", "advice"),
    [("ABRT", "a fault of TensorRT-RTX.*--ignore.*--builder kit"), ("KILL", "ran out of memory")],
    ids=["abort", "out of memory"],
)
def test_a_builder_that_dies_becomes_an_error_with_its_last_message(
    spec: EngineSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, advice: str
) -> None:
    """A child that warns, then ends as by TensorRT's abort or the kernel's killer, which leaves half a plan."""
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\ncat > /dev/null\n"
        f"head -c 1000 /dev/zero > {spec.partial}\n"
        """echo '{"progress": [0.5, "Optimizing graph"]}'\necho '{"message": ["WARNING", "about to fall"]}'\n"""
        f"echo 'terminate called without an active exception' >&2\nkill -{name} $$\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(UserError) as caught:
        build(spec)
    assert f"SIG{name}" in caught.value.what
    assert re.search(advice, caught.value.fix)
    assert "Optimizing graph" in caught.value.what
    assert "about to fall" in caught.value.found
    assert "terminate called" in caught.value.found
    assert left(spec) == []


def test_a_crash_of_the_real_builder_says_what_was_built_and_what_to_do(spec: EngineSpec) -> None:
    """A Slice of what was quantized by token with computed scales, as `LastLogits` must not leave it."""
    by_token = {"axis": -1, "block_size": K}
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("ReduceMax", ["a", "axis"], ["scale"], keepdims=1),
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], output_dtype=TensorProto.INT8, **by_token),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"], **by_token),
        helper.make_node("Slice", ["d", "start", "stop", "one"], ["y"]),
    ]
    numbers = {"axis": -1, "start": -1, "stop": np.iinfo(np.int64).max, "one": 1}
    model(spec.onnx, nodes, **{name: np.array([value], np.int64) for name, value in numbers.items()})
    with pytest.raises(UserError, match=r"engine for sm89: the process of TensorRT-RTX ended \(SIGSEGV\)") as caught:
        build(spec)
    assert "--builder kit" in caught.value.fix
    assert left(spec) == []


def test_an_interruption_ends_the_child_and_leaves_nothing(spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: children.append(popen(*a, **k)) or children[-1])

    def interrupt() -> None:
        while not children:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        build(spec)
    assert children[0].returncode == -signal.SIGKILL
    assert left(spec) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a TensorRT engine"),
        (b"PK\x03\x04" + bytes(100), "not a TensorRT engine"),
        (b"vtrt", "not a TensorRT"),
    ],
    ids=["empty", "foreign", "short"],
)
def test_a_foreign_file_is_recognised_by_its_header(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.engine"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_header(path)


def test_a_truncated_engine_is_recognised_by_its_header(spec: EngineSpec) -> None:
    build(spec)
    data = spec.engine.read_bytes()
    spec.engine.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="the engine is truncated"):
        read_header(spec.engine)


def test_loading_without_a_gpu_is_an_error_not_a_crash(spec: EngineSpec) -> None:
    if tensorrt_sees_a_gpu():
        pytest.skip("this machine has a GPU")
    build(spec)
    with pytest.raises(UserError, match="cannot load this engine"):
        tensorrt.load("tensorrt_rtx", spec.engine)


def tensorrt_sees_a_gpu() -> bool:
    from instantrt.compiler.backend.tensorrt.gpu import gpus

    return bool(gpus())


@pytest.mark.parametrize(
    "options", [{"optimization_level": 6}, {"memory_limit": 0}], ids=["optimization level", "memory limit"]
)
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError):
        EngineOptions(**options)


def test_options_that_rtx_takes(spec: EngineSpec) -> None:
    options = EngineOptions(memory_limit=1 << 8, optimization_level=1, weight_streaming=True)
    assert build(replace(spec, options=options)).bytes
