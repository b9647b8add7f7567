"""From the example model to an engine and a build kit, and what `--check` says of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from compiler.artifact import read_manifest
from compiler.backend.tensorrt import read_header
from compiler.build import build_kit, compile_model
from compiler.check import check
from compiler.engine import Choice, choose_builder, compute_type
from compiler.gpu import gpus
from compiler.kit import read_kit
from compiler.request import Request
from compiler.target import find_target
from passes.errors import UserError
from tests.conftest import TINY

NO_GPU = not gpus()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine for sm89, and a kit for sm90 from the same lowered model."""
    folder = tmp_path_factory.mktemp("engine") / "out"
    request = Request(
        TINY,
        ("sm89", "sm90"),
        folder,
        quant="a16w4",
        group_size=64,
        max_batch=2,
        max_length=256,
        opt_length=64,
        kv_cache="in-place",
        builder="auto" if NO_GPU else "tensorrt-rtx",
    )
    compile_model(request)
    return folder


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    """`out`, to be damaged."""
    return Path(shutil.copytree(out, tmp_path / "copy"))


def test_the_output_is_engines_a_kit_and_nothing_else(out: Path) -> None:
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "sm89", "sm90"]
    assert (out / "sm89" / "model.engine").is_file()
    assert (out / "sm89" / "tokenizer.json").is_file()
    assert not (out / "sm89" / "model.onnx").exists()
    assert {"kit.json", "model.onnx", "model.onnx.data"} <= {p.name for p in (out / "sm90").iterdir()}


def test_the_manifest_describes_the_engine(out: Path) -> None:
    by_target = {a.target: a for a in read_manifest(out)}
    engine = by_target["sm89"].engine
    assert engine is not None
    assert (engine["builder"], engine["sm"], engine["precision"]) == ("tensorrt_rtx", 89, "bfloat16")
    assert Counter(engine["weights"].values()) == {"Int4 fused": 28}
    assert len(engine["profiles"]) == 2
    limits = {"cache": "shared", "max_batch": 2, "max_length": 256, "opt_length": 64, "logits": "last"}
    assert by_target["sm89"].limits == limits
    assert by_target["sm90"].kind == "kit"
    shapes = {t.name: t.shape for t in (*by_target["sm89"].inputs, *by_target["sm89"].outputs)}
    assert shapes["logits"] == ("batch", 1, 4096)
    assert shapes["past_key_values.0.key"] == shapes["present.0.key"] == ("batch", 2, 256, 64)


def test_check_says_what_was_built_and_what_this_machine_has(out: Path) -> None:
    lines = {line.partition(":")[0]: line for line in check(out)}
    assert "built by TensorRT-RTX" in lines["sm89"]
    assert "for sm89" in lines["sm89"]
    assert "compile build" in lines["sm90"]
    if NO_GPU:
        assert "this machine has no NVIDIA GPU, so it was not loaded" in lines["sm89"]


def damage_engine(folder: Path) -> None:
    path = folder / "sm89" / "model.engine"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def forget_tokenizer(folder: Path) -> None:
    (folder / "sm89" / "tokenizer.json").unlink()


def edit(folder: Path, change: dict) -> None:
    path = folder / "manifest.json"
    body = json.loads(path.read_text())
    body["artifacts"][0].update(change)
    path.write_text(json.dumps(body))


def lie_about_the_version(folder: Path) -> None:
    engine = json.loads((folder / "manifest.json").read_text())["artifacts"][0]["engine"]
    edit(folder, {"engine": {**engine, "version": "1.0.0.1"}})


def foreign_engine(folder: Path) -> None:
    """A file that is consistent with its digest, and no engine."""
    from compiler.artifact import sha256

    path = folder / "sm89" / "model.engine"
    path.write_bytes(b"#!/bin/sh\necho engines are code\n")
    edit(folder, {"digests": {"sm89/model.engine": sha256(path)}})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_engine, "a file is not what was written"),
        (forget_tokenizer, "no such file"),
        (lie_about_the_version, "not the one that the manifest describes"),
        (foreign_engine, "not a TensorRT engine"),
        (
            lambda folder: edit(folder, {"digests": {"../secret": "0", "sm89/model.engine": "0"}}),
            "leads out of the folder",
        ),
        (lambda folder: edit(folder, {"digests": {}}), "no digest of this file"),
    ],
    ids=["damaged", "missing", "version", "foreign", "path", "no digest"],
)
def test_check_refuses(copy: Path, damage, words: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    damage(copy)
    monkeypatch.setattr("compiler.check.load", lambda *a: pytest.fail("loaded before it was checked"))
    with pytest.raises(UserError, match=words):
        list(check(copy))


def kit_for(folder: Path, target: str) -> Path:
    """The kit, made out for another target: this machine cannot finish one for Hopper."""
    path = folder / "sm90" / "kit.json"
    path.write_text(path.read_text().replace('"sm90"', f'"{target}"'))
    return folder / "sm90"


def test_a_kit_is_finished_elsewhere_into_the_same_engine(copy: Path, tmp_path: Path) -> None:
    artifact = build_kit(read_kit(kit_for(copy, "sm89")), tmp_path / "built", "tensorrt-rtx", lambda text: None)
    (original,) = (a for a in read_manifest(copy) if a.target == "sm89")
    assert artifact.kind == "engine"
    assert artifact.limits == original.limits
    assert artifact.engine is not None
    assert original.engine is not None
    assert artifact.engine["weights"] == original.engine["weights"]
    assert list(check(tmp_path / "built"))


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU, which may be the one the kit is for")
def test_a_kit_that_this_machine_cannot_finish_says_why(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot build for sm90 either"):
        build_kit(read_kit(out / "sm90"), tmp_path / "built", "auto", lambda text: None)
    assert not (tmp_path / "built").exists()


def test_a_kit_prints_the_command_of_tensorrts_own_tool(out: Path) -> None:
    command = json.loads((out / "sm90" / "kit.json").read_text())["trtexec"]
    assert command.startswith("trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped --profile=0 ")
    assert "--maxShapes=input_ids:2x256,attention_mask:2x256" in command
    assert "--profile=1" in command


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"model.onnx.data": "', '"model.onnx.data": "0', "not what was written"),
        ('"plugins": []', '"plugins": ["../evil.so"]', "leaves the kit"),
        ('"format": 1', '"format": 9', "another version"),
        ('"precision"', '"imprecision"', "not a kit of ours"),
    ],
    ids=["digest", "path", "format", "key"],
)
def test_a_kit_is_checked_before_it_is_built(copy: Path, old: str, new: str, words: str) -> None:
    path = copy / "sm90" / "kit.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=words):
        read_kit(copy / "sm90")


def test_polygraphy_works_on_the_lowered_model(out: Path, tmp_path: Path) -> None:
    """Inspected, sanitized without expanding a weight, and built with Polygraphy's own TensorRT-RTX backend."""
    program = str(Path(sys.executable).with_name("polygraphy"))
    env = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}

    def polygraphy(*words: str) -> str:
        done = subprocess.run([program, *words], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    kit = read_kit(out / "sm90")
    assert polygraphy("inspect", "model", str(kit.onnx), "--show", "layers").count("[Op: DequantizeLinear]") == 28
    polygraphy(
        "surgeon", "sanitize", str(kit.onnx), "--fold-constants", "-o", "clean.onnx", "--save-external-data", "d"
    )
    assert (tmp_path / "d").stat().st_size < 1.1 * (out / "sm90" / "model.onnx.data").stat().st_size
    shapes = [
        word
        for i, size in enumerate(("min", "opt", "max"))
        for word in (
            f"--trt-{size}-shapes",
            *(f"{n}:{list(s[i])}".replace(" ", "") for n, s in kit.settings.profiles[0].items()),
        )
    ]
    polygraphy(
        "convert", str(kit.onnx), "--convert-to", "trt", "-o", "m.engine", "--compute-capabilities", "8.9", *shapes
    )
    assert read_header(tmp_path / "m.engine").flavour == "tensorrt_rtx"


@pytest.mark.parametrize("target", ["sm75", "sm89"])
def test_the_compute_type_is_the_checkpoints_where_the_gpu_has_it(target: str) -> None:
    bfloat16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
    row = find_target(target)
    assert compute_type(row, {bfloat16: 10, float32: 2}) == (bfloat16 if row.bf16 else np.float16)
    assert compute_type(row, {float32: 2}) == np.float16


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU, beside which full TensorRT may build")
def test_who_builds_what_without_a_gpu() -> None:
    assert choose_builder(find_target("sm89"), "auto") == Choice("tensorrt_rtx")
    assert "has no sm90" in choose_builder(find_target("sm90"), "auto").reason
    assert "no int4" in choose_builder(find_target("sm75"), "auto", int4=True).reason
    assert choose_builder(find_target("sm75"), "auto") == Choice("tensorrt_rtx")
    assert choose_builder(find_target("sm89"), "kit").flavour is None
    with pytest.raises(UserError, match="cannot build for sm90 here"):
        choose_builder(find_target("sm90"), "tensorrt-rtx")
