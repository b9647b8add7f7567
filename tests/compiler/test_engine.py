"""From the example model to an engine and a build kit, and what `instantrt check` says of them."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from instantrt.compiler.artifact.digest import sha256
from instantrt.compiler.artifact.manifest import read_manifest
from instantrt.compiler.artifact.staging import check_out
from instantrt.compiler.backend.tensorrt.build import read_header
from instantrt.compiler.backend.tensorrt.choose import Choice, choose_builder, compute_type
from instantrt.compiler.backend.tensorrt.gpu import Gpu, gpus
from instantrt.compiler.backend.tensorrt.kit import build_kit, read_kit
from instantrt.compiler.check import check
from instantrt.compiler.compile import compile_model
from instantrt.compiler.options import EngineOptions
from instantrt.compiler.plan import plan
from instantrt.compiler.request import Request
from instantrt.compiler.serving.runtime.integrity import check_folder
from instantrt.compiler.target import find_target
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array
from instantrt.passes.qdq.join_linears import parts_of
from instantrt.tools.cli.show import show_explanation
from tests.checkpoints import whole_checkpoint
from tests.conftest import ROOT, TINY
from tests.repositories import write_repository

pytestmark = pytest.mark.slow

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
    assert Counter(engine["weights"].values()) == {"Int4 fused": 16}, "q, k and v are one product; gate and up another"
    assert sorted(path for name in engine["weights"] for path in parts_of(name)) == sorted(by_target["sm89"].quant)
    assert len(engine["profiles"]) == 2
    limits = {"cache": "shared", "max_batch": 2, "max_length": 256, "opt_length": 64, "logits": "last"}
    assert by_target["sm89"].limits == limits
    assert by_target["sm90"].kind == "kit"
    shapes = {t.name: t.shape for t in (*by_target["sm89"].inputs, *by_target["sm89"].outputs)}
    assert shapes["logits"] == ("batch", 1, 4096)
    assert shapes["past_key_values.0.key"] == shapes["present.0.key"] == ("batch", 2, 256, 64)


@pytest.mark.skipif(not NO_GPU, reason="the builder for sm89 is TensorRT-RTX where there is no GPU")
def test_an_engine_keeps_its_cache_in_int8(tmp_path: Path) -> None:
    """Built by the real builder; the smoke run holds the graph that it was built from against the twin."""
    request = Request(TINY, ("sm89",), tmp_path / "out", max_length=64, kv_cache_type="int8")
    (artifact,) = compile_model(request)
    assert artifact.kind == "engine"
    assert {t.dtype for t in (*artifact.inputs[3:], *artifact.outputs[1:])} == {"int8"}


def test_rows_of_a_cache_in_place_end_where_their_mask_ends(out: Path) -> None:
    """The kit holds the graph that the engine was built from: TensorRT takes positions that come from the mask."""
    graph = onnx.load(out / "sm90" / "model.onnx", load_external_data=False).graph
    made_by = {name: node for node in graph.node for name in node.output}
    scatters = [node for node in graph.node if node.op_type == "TensorScatter"]
    assert len(scatters) == 2 * 4
    (position,) = {node.input[2] for node in scatters}
    chain = [made_by[position]]
    while (before := made_by.get(chain[-1].input[0])) is not None:
        chain.append(before)
    assert [node.op_type for node in chain] == ["Max", "Sub", "ReduceMax", "Where", "Cast"]
    assert chain[-1].input[0] == "attention_mask"


def test_the_engine_in_a_repository_passes_its_own_check(out: Path, tmp_path: Path) -> None:
    write_repository(out, tmp_path / "repository")
    (model,) = (tmp_path / "repository").glob("*_generate")
    assert '"max_batch", value: { string_value: "2" }' in (model / "config.pbtxt").read_text("utf-8")
    assert check_folder(model / "1", "engine") == ()


def test_check_says_what_was_built_and_what_this_machine_has(out: Path) -> None:
    lines = {line.partition(":")[0]: line for line in check(out)}
    assert "built by TensorRT-RTX" in lines["sm89"]
    assert "for sm89" in lines["sm89"]
    assert (
        f"on a machine with an sm90 GPU and TensorRT >=10.15, finish it with: instantrt build {out / 'sm90'}"
        in (lines["sm90"])
    )
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
    path = folder / "sm89" / "model.engine"
    path.write_bytes(b"#!/bin/sh\necho engines are code\n")
    edit(folder, {"digests": {"sm89/model.engine": sha256(path)}})


def truncated_engine(folder: Path) -> None:
    """Cut in two before its digest was taken."""
    path = folder / "sm89" / "model.engine"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    edit(folder, {"digests": {"sm89/model.engine": sha256(path)}})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_engine, "model.engine: this is not what compile wrote\n.*sha256 .*\n.*[0-9a-f]{64}"),
        (forget_tokenizer, "tokenizer.json: this is not what compile wrote\n.*\n.*no such file"),
        (lie_about_the_version, "not the one that the manifest describes"),
        (foreign_engine, "not a TensorRT engine"),
        (truncated_engine, "the engine is truncated"),
        (lambda folder: (folder / "manifest.json").unlink(), "nothing that compile wrote is here"),
        (
            lambda folder: edit(folder, {"digests": {"../secret": "0", "sm89/model.engine": "0"}}),
            "leads out of the folder",
        ),
        (lambda folder: edit(folder, {"digests": {}}), "model.engine: .*\n.*a digest in its record\n.*none"),
    ],
    ids=["damaged", "missing", "version", "foreign", "truncated", "no manifest", "path", "no digest"],
)
def test_check_refuses(copy: Path, damage, words: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    damage(copy)
    monkeypatch.setattr("instantrt.compiler.check.load", lambda *a: pytest.fail("loaded before it was checked"))
    with pytest.raises(UserError, match=words):
        list(check(copy))


def test_a_runtime_of_another_version_is_not_loaded(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with the engine's GPU, and a newer TensorRT-RTX."""
    monkeypatch.setattr("instantrt.compiler.check.gpus", lambda: (Gpu("RTX 4090", 89),))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9.9.9")
    monkeypatch.setattr("instantrt.compiler.check.load", lambda *a: pytest.fail("loaded with another version"))
    with pytest.raises(UserError, match="the engine and the installed runtime differ") as caught:
        list(check(out))
    assert caught.value.found == "9.9.9.9"
    assert caught.value.fix.startswith("pip install tensorrt-rtx==1.7.1.116")


def test_check_says_that_a_gpu_loads_no_engine_of_rtx(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200 none of them loads; beside another GPU that it serves nothing is said of that."""
    for name, sm in (("NVIDIA H200", 90), ("L4", 86), ("later", 130)):
        monkeypatch.setattr("instantrt.compiler.backend.tensorrt.gpu.gpus", lambda name=name, sm=sm: (Gpu(name, sm),))
        monkeypatch.setattr("instantrt.compiler.check.gpus", lambda name=name, sm=sm: (Gpu(name, sm),))
        line = next(line for line in check(out) if line.startswith("sm89"))
        assert f"{name} (sm{sm}), so it was not loaded" in line
        lost = "no engine of TensorRT-RTX loads on sm90; compile for sm90 instead, and finish the build kit here: pip"
        assert (f"{lost} install 'tensorrt>=10.15'" in line) == (sm == 90)
        assert ("no engine" in line) == (sm == 90)


def test_an_operator_that_tensorrt_lacks_leaves_no_artifact(tmp_path: Path) -> None:
    """A plain .onnx file, for a target that builds here and one that gets a kit."""
    nodes = [
        helper.make_node("Det", ["x"], ["y"], name="first"),
        helper.make_node("Unique", ["y"], ["z"], name="second"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4, 4])
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n"])
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [z]), opset_imports=[helper.make_opsetid("", 21)])
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UserError) as caught:
        compile_model(Request(tmp_path / "m.onnx", ("sm89",), tmp_path / "rtx"))
    assert "first (Det): TensorRT has no such operation" in caught.value.found
    assert "second (Unique): TensorRT has no such operation" in caught.value.found
    with pytest.raises(UserError, match=r"first \(Det\): its parser has no such operator\n.*second \(Unique\)"):
        compile_model(Request(tmp_path / "m.onnx", ("sm70",), tmp_path / "volta"))
    assert not [path for out in ("rtx", "volta") for path in (tmp_path / out).glob("**/*")]


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while the builder, a process of its own, is at work."""
    words = [TINY, "--target", "sm89", "--quant", "a16w8", "-o", tmp_path / "out"]
    command = [sys.executable, "-m", "instantrt", "compile", *words]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    builders: list[int] = []
    while not builders and time.monotonic() < deadline and child.poll() is None:
        builders = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
        time.sleep(0.05)
    time.sleep(1)  # TensorRT is loaded or the graph is parsed by now
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err.endswith("interrupted; nothing half-written was left\nFAILED\n")
    assert builders
    assert not any(Path(f"/proc/{pid}").exists() for pid in builders)
    assert not (tmp_path / "out").exists()


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


def test_the_plugin_of_a_kit_goes_with_the_engine(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "sm90" / "libwoq.so").write_bytes(b"a library")
    (copy / "sm90" / "libwoq.choices").write_bytes(b"# measured on the machine that finishes the kit")
    path = kit_for(copy, "sm89") / "kit.json"
    body = json.loads(path.read_text())
    body["plugins"], body["artifact"]["plugins"] = ["libwoq.so"], ["sm89/libwoq.so"]
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match=r"libwoq.so: .*\n.*a digest in its record"):
        read_kit(copy / "sm90")
    body["digests"]["libwoq.so"] = sha256(copy / "sm90" / "libwoq.so")
    path.write_text(json.dumps(body))
    monkeypatch.setattr("instantrt.compiler.backend.tensorrt.kit.build_engine", lambda *a: {"builder": "tensorrt_rtx"})
    artifact = build_kit(read_kit(copy / "sm90"), tmp_path / "built", "tensorrt-rtx", lambda text: None)
    (library,) = artifact.plugins
    assert (tmp_path / "built" / library).read_bytes() == b"a library"
    assert {library, "sm89/libwoq.choices"} <= set(artifact.digests)

    choices = copy / "sm90" / "libwoq.choices"
    os.link(choices, tmp_path / "elsewhere")
    choices.unlink()
    choices.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of the folder"):
        build_kit(read_kit(copy / "sm90"), tmp_path / "other", "tensorrt-rtx", lambda text: None)
    assert not (tmp_path / "other").exists()

    (tmp_path / "elsewhere").rename(choices)
    path.write_text(path.read_text().replace("sm89", "sm86"))
    in_place = (copy / "sm90").rename(copy / "sm86")
    with pytest.raises(UserError, match="would be lost"):
        check_out(copy, [find_target("sm86")])
    build_kit(read_kit(in_place), copy, "tensorrt-rtx", lambda text: None)
    assert (in_place / "libwoq.choices").read_bytes().startswith(b"# measured")


def test_a_kit_finished_where_it_lies_leaves_the_other_artifacts(copy: Path) -> None:
    """The kit becomes one for sm86, which the folder has nothing for yet."""
    build_kit(read_kit(kit_for(copy, "sm86")), copy, "tensorrt-rtx", lambda text: None)
    assert [a.target for a in read_manifest(copy)] == ["sm89", "sm90", "sm86"]
    assert {a.source["model"] for a in read_manifest(copy)} == {TINY.name}
    build_kit(read_kit(copy / "sm90"), copy, "tensorrt-rtx", lambda text: None)
    assert [a.target for a in read_manifest(copy)] == ["sm89", "sm90", "sm86"]


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU, which may be the one the kit is for")
def test_a_kit_that_this_machine_cannot_finish_says_why(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot build for sm90 either") as caught:
        build_kit(read_kit(out / "sm90"), tmp_path / "built", "auto", lambda text: None)
    assert "full TensorRT builds beside an sm90 GPU: pip install 'tensorrt>=10.15'" in caught.value.fix
    with pytest.raises(UserError, match="cannot build for sm90 here") as caught:
        build_kit(read_kit(out / "sm90"), tmp_path / "built", "tensorrt", lambda text: None)
    assert "build kit" not in caught.value.fix  # it is one
    assert not (tmp_path / "built").exists()


def test_a_kit_prints_the_command_of_tensorrts_own_tool(out: Path) -> None:
    command = json.loads((out / "sm90" / "kit.json").read_text())["trtexec"]
    assert command.startswith("trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped --profile=0 ")
    assert "--maxShapes=input_ids:2x256,attention_mask:2x256" in command
    assert "--profile=1" in command


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"model.onnx.data": "', '"model.onnx.data": "0', "not what compile wrote"),
        ('"plugins": []', '"plugins": ["../evil.so"]', r"evil.so: .*\n.*a digest in its record"),
        ('"model.onnx.data": "', '"../evil": "0", "model.onnx.data": "', "leads out of the folder"),
        ('"format": 3', '"format": 9', "another version"),
        ('"precision"', '"imprecision"', "not a kit of ours"),
    ],
    ids=["digest", "plugin", "path", "format", "key"],
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
    # What it infers shapes of a file into, it leaves where temporary files go.
    env = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1", "TMPDIR": str(tmp_path)}

    def polygraphy(*words: str) -> str:
        done = subprocess.run([program, *words], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    kit = read_kit(out / "sm90")
    assert polygraphy("inspect", "model", str(kit.onnx), "--show", "layers").count("[Op: DequantizeLinear]") == 16
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


@pytest.mark.parametrize(
    ("quant", "words"),
    [
        ("a16w8", "int8 by channel + zero point correction, with k_proj and v_proj"),
        ("a16w4", "int4 blocks of 128"),
        ("a8w8", "int8 GEMM"),
    ],
)
def test_an_explanation_says_what_each_layer_became(
    quant: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    monkeypatch.setattr("instantrt.tools.cli.show.console", console)
    show_explanation(plan(Request(TINY, ("sm89",), tmp_path, quant=quant, builder="kit")))
    (line,) = (line for line in console.export_text().splitlines() if "self_attn.q_proj" in line)
    assert words in line


def test_an_explanation_says_which_target_runs_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    monkeypatch.setattr("instantrt.tools.cli.show.console", console)
    targets = ("x86", "sm80", "sm89", "sm70")
    show_explanation(plan(Request(TINY, targets, tmp_path, quant="a16w4", group_size=128, builder="kit")))
    shown = console.export_text()
    words = " ".join(re.sub(r"[│\s]+", " ", shown.split("self_attn.o_proj")[1].split("mlp.gate_proj")[0]).split())
    assert "x86: A16W4 group 128 asymmetric: MatMulNBits, 4 bits" in words
    assert "sm80, sm89, sm70: A16W4 group 128 asymmetric: int4 blocks of 128" in words
    assert max(map(len, shown.splitlines())) <= 80
    assert "model.layers.{0-3}.self_attn.o_proj" in shown


@pytest.mark.parametrize(
    ("quant", "group", "shared"), [("a16w4", 64, True), ("a16w4", 32, False), ("a16w8", 64, False)]
)
def test_blocks_that_only_rtx_is_known_to_take(quant: str, group: int, shared: bool, tmp_path: Path) -> None:
    """Kits for full TensorRT hold documented blocks alone; where all are, they share their graph with TensorRT-RTX."""
    lowered = plan(Request(TINY, ("sm89", "sm90"), tmp_path, quant=quant, group_size=group, builder="kit")).lowered
    assert (lowered["sm89"] is lowered["sm90"]) == shared
    blocks = {
        target: {n.attrs.get("block_size", 0) for n in graph.nodes if n.op == "DequantizeLinear"}
        for target, graph in lowered.items()
    }
    assert blocks["sm89"] == {group}
    assert blocks["sm90"] == ({64} if shared else {128} if quant == "a16w4" else {0})


@pytest.mark.parametrize("target", ["sm75", "sm89"])
def test_the_compute_type_is_the_checkpoints_where_the_gpu_has_it(target: str) -> None:
    bfloat16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
    row = find_target(target)
    assert compute_type(row, {bfloat16: 10, float32: 2}) == (bfloat16 if row.bf16 else np.float16)
    assert compute_type(row, {float32: 2}) == np.float16


def test_quantized_weights_do_not_decide_the_compute_type(tmp_path: Path) -> None:
    """Most of the checkpoint are int8 codes; with float32 scales beside a small vocabulary it is bfloat16 still."""

    def shrink(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        config.update(vocab_size=64, num_hidden_layers=1, layer_types=["full_attention"])
        for name, array in tensors.items():
            tensors[name] = array[:64] if array.shape[:1] == (4096,) else array
            if name.endswith("weight_scale"):
                tensors[name] = array.astype(np.float32)

    model = whole_checkpoint("ct-w8a8-dyn", tmp_path / "model", shrink)
    request = Request(model, ("sm75", "sm89"), tmp_path / "out", builder="kit")
    planned = plan(request)
    assert {name: dtype.name for name, dtype in planned.types.items()} == {"sm75": "float16", "sm89": "bfloat16"}
    assert [note for note in planned.notes if "bfloat16" in note] == [
        "sm75: computes in float16, the checkpoint is bfloat16: this GPU has none"
    ]


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU, beside which full TensorRT may build")
def test_who_builds_what_without_a_gpu() -> None:
    assert choose_builder(find_target("sm89"), "auto") == Choice("tensorrt_rtx")
    assert "has no sm90" in choose_builder(find_target("sm90"), "auto").reason
    assert "no int4" in choose_builder(find_target("sm75"), "auto", int4=True).reason
    assert choose_builder(find_target("sm75"), "auto") == Choice("tensorrt_rtx")
    assert choose_builder(find_target("sm89"), "kit").flavour is None
    with pytest.raises(UserError, match=r"(?s)cannot build for sm90 here.*nor loads there.*build kit") as caught:
        plan(Request("nowhere", ("sm89", "sm90"), "out", builder="tensorrt-rtx"))  # before the model is looked for
    assert "beside an sm90 GPU: pip install 'tensorrt>=10.15'" in caught.value.fix
    for options in (EngineOptions(version_compatible=True), EngineOptions(hardware_compatible="ampere_plus")):
        assert "has no version-compatible" in choose_builder(find_target("sm89"), "auto", options=options).reason
        with pytest.raises(UserError, match="has no version-compatible"):
            choose_builder(find_target("sm89"), "tensorrt-rtx", options=options)
