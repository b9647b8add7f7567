"""The road end to end: artifacts, determinism, accuracy of every CPU mode, and what is left behind when it fails."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from instantrt.compiler import build, pipeline
from instantrt.compiler.artifact.manifest import read_manifest
from instantrt.compiler.build import Plan, Twin, compile_model, compile_planned
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.quant import instant
from instantrt.compiler.quant.config import parse_quant_config
from instantrt.compiler.quant.resolve import asked_config
from instantrt.compiler.request import Request
from instantrt.compiler.serving.runtime.integrity import sha256
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import PassLog
from instantrt.tools.bench.compile import STAGE
from instantrt.tools.cli.perplexity import artifact_logits, perplexity, transformers_logits, windows
from tests.conftest import ROOT, TEXT, TINY

FLOAT32 = np.dtype(np.float32)


def compiled(model: FloatModel, out: Path, **fields: Any) -> Plan:
    """compile_model without the export: the fixture's graph, quantized, lowered and written."""
    request = Request(TINY, fields.pop("targets", ("x86",)), out, **fields)
    config, ledger = asked_config(request, "instant_quant"), PassLog()
    linears = pipeline.linears(model.graph)
    decisions = instant.decide(linears, config, FLOAT32, "lm_head", request.lm_head) if config else {}
    canonical = pipeline.quantize(model.graph.copy(), decisions, ledger)
    lowered = {
        t.name: pipeline.lower_onnxruntime(canonical.copy(), t, request, ledger) for t in request.resolved_targets()
    }
    planned = Plan(model, dict.fromkeys(lowered, Twin(decisions, canonical)), lowered, ledger)
    compile_planned(request, planned)
    return planned


@pytest.fixture(scope="module")
def text() -> list[np.ndarray]:
    return list(windows(Tokenizer.from_file(str(TINY / "tokenizer.json")), TEXT.read_text("utf-8")))


@pytest.fixture(scope="module")
def float_perplexity(text: list[np.ndarray]) -> float:
    return perplexity(transformers_logits(TINY), text)


@pytest.mark.parametrize(
    ("fields", "percent"),
    [
        ({"quant": "none"}, 0.001),
        ({"quant": "a16w8"}, 0.1),
        ({"quant": "a16w8", "cpu_preset": "fast"}, 0.1),
        ({"quant": "a16w8", "group_size": 32}, 0.1),
        ({"quant": "a16w8", "group_size": 128}, 0.1),
        ({"quant": "a8w8"}, 0.1),
        ({"quant": "a16w8", "lm_head": "int8", "embeddings": "int8"}, 0.1),
        ({"quant": "a16w4", "group_size": 32}, 0.6),
        ({"quant": "a16w4", "group_size": 128}, 1.5),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else str(v),
)
def test_perplexity_stays_near_float(
    tiny_float: FloatModel, tmp_path: Path, text: list[np.ndarray], float_perplexity: float, fields: Any, percent: float
) -> None:
    compiled(tiny_float, tmp_path, **fields)
    value = perplexity(artifact_logits(tmp_path), text)
    assert abs(value / float_perplexity - 1) * 100 < percent


def test_the_perplexity_bound_bites(
    tiny_float: FloatModel, tmp_path: Path, text: list[np.ndarray], float_perplexity: float
) -> None:
    """Per-channel uint4, which is that much worse, breaks the 8-bit bound."""
    compiled(tiny_float, tmp_path, quant="a16w4")
    assert perplexity(artifact_logits(tmp_path), text) / float_perplexity - 1 > 0.001


def test_the_same_input_gives_the_same_bytes(tiny_float: FloatModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compiled(tiny_float, tmp_path / name, quant="a16w8", targets=("x86", "armv9"))
    a, b = (read_manifest(tmp_path / name) for name in ("a", "b"))
    assert a == b
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()
    files = json.loads((tmp_path / "a/manifest.json").read_text())["artifacts"][0]["source"]["files"]
    assert set(files) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    assert all(sha256(TINY / name) == digest for name, digest in files.items())
    for artifact in a:
        assert all(sha256(tmp_path / "a" / file) == digest for file, digest in artifact.digests.items())


def test_an_artifact_does_not_depend_on_what_is_compiled_beside_it(
    tiny_float: FloatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x86 stores float32 scales, sm75 float16, sm89 bfloat16: codes are computed against each one's own."""
    monkeypatch.setattr(build, "load", lambda *a, **k: replace(tiny_float, graph=tiny_float.graph.copy()))

    def files(*targets: str) -> dict[str, str]:
        out = tmp_path / "-".join(targets)
        builder = {} if targets == ("x86",) else {"builder": "kit"}
        compile_model(Request(TINY, targets, out, quant="a16w8", **builder))
        return {str(p.relative_to(out)): sha256(p) for p in out.glob("*/*")}

    assert files("x86", "sm75", "sm89") == files("x86") | files("sm75") | files("sm89")


def test_tables_keep_their_sixteen_bits(tiny_float: FloatModel, tmp_path: Path) -> None:
    """Two float tables of 4096 x 256: 2 bytes an element in the artifact, 1 when asked."""
    sizes = {}
    for name, fields in {"stored": {}, "int8": {"lm_head": "int8", "embeddings": "int8"}}.items():
        compiled(tiny_float, tmp_path / name, quant="a16w8", **fields)
        sizes[name] = (tmp_path / name / "x86/model.onnx.data").stat().st_size
    table = 4096 * 256
    assert sizes["stored"] - sizes["int8"] == pytest.approx(2 * table, rel=0.1)


def test_ignored_layers_stay_float(tiny_float: FloatModel, tmp_path: Path) -> None:
    planned = compiled(tiny_float, tmp_path, quant="a16w8", ignore=("*.down_proj", "model.layers.0.*"))
    left = [path for path, d in planned.twins["x86"].decisions.items() if not isinstance(d, QuantTensor)]
    assert len(left) == 3 + 7 + 1


def test_a_group_that_does_not_divide_is_refused(tiny_float: FloatModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"group_size does not divide") as caught:
        compiled(tiny_float, tmp_path, quant="a16w8", group_size=96)
    assert caught.value.where == "model.layers.0.self_attn.q_proj, and 23 more"  # down_proj is 768 wide
    assert caught.value.fix == "--group-size 128, 64, 32, -1 (per channel)"  # too many kinds of layers to ignore
    with pytest.raises(UserError) as caught:
        compiled(tiny_float, tmp_path, quant="a16w8", group_size=512, ignore=("*_proj",), lm_head="int8")
    assert caught.value.fix.endswith("or --ignore 'lm_head'")


def test_a_group_without_a_kernel_is_refused(tiny_float: FloatModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no form for this quantized layer") as caught:
        compiled(tiny_float, tmp_path, quant="a16w8", group_size=8)
    assert caught.value.where == "model.layers.0.self_attn.q_proj, and 27 more"
    assert "--ignore" not in caught.value.fix
    with pytest.raises(UserError) as caught:
        compiled(tiny_float, tmp_path, quant="a16w8", group_size=8, ignore=("*attn*", "*gate_proj", "*up_proj"))
    assert caught.value.fix.endswith("or --ignore 'model.layers.*.mlp.down_proj'")
    assert not (tmp_path / "x86").exists()


def test_weights_that_are_not_finite_are_named_and_nothing_is_left(tiny_float: FloatModel, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(TINY, broken)
    name = "model.layers.2.mlp.up_proj.weight"
    tensor = tiny_float.tensors[name]
    with (broken / "model.safetensors").open("r+b") as file:
        file.seek(tensor.offset + 2 * (5 * 256 + 9))
        file.write(b"\xc0\x7f")  # bfloat16 NaN
    tensors = {k: replace(t, path=broken / "model.safetensors") for k, t in tiny_float.tensors.items()}
    found = next(f for f in pipeline.linears(tiny_float.graph) if f.path in name)
    config = parse_quant_config({"weight_format": "int8"}, "t")
    q = instant.instant(replace(found, rows=tensors[name]), config, FLOAT32, 8)
    with pytest.raises(UserError, match=r"up_proj\[5, 9\]") as caught:
        list(q.tiles())
    assert caught.value.found == "nan"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for less than the artifact."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_nothing(tiny_float: FloatModel, small_disk: Path) -> None:
    with pytest.raises(UserError, match="could not be written"):
        compiled(tiny_float, small_disk / "out", quant="a16w8")
    assert list(small_disk.iterdir()) == []


def cli(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "compiler", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_compile_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """Stopped while it writes, slowed down so that the signal finds it there."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "import instantrt.compiler.backend.onnx_writer as writer\n"
        "from compiler.__main__ import main\n"
        "write = writer.write_source\n"
        "def slow(*a):\n    print('in a tensor', flush=True); time.sleep(2); write(*a)\n"
        "writer.write_source = slow\n"
        "main()\n"
    )
    command = [sys.executable, script, TINY, "--target", "x86", "--quant", "a16w8", "-o", tmp_path / "out"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    for line in child.stdout:
        if "in a tensor" in line:
            break
    child.send_signal(number)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "nothing half-written was left" in stderr
    assert not (tmp_path / "out").exists()


def test_the_command_compiles_explains_and_generates(tmp_path: Path) -> None:
    out, err = cli(TINY, "--target", "x86", "--quant", "a16w8", "--explain", "-o", tmp_path).communicate()
    assert err == ""
    assert "PASSED" in out
    assert "lm_head" in out
    generate = [
        sys.executable,
        "-m",
        "instantrt.tools.cli.generate",
        str(tmp_path),
        "--prompt",
        "Once upon a time",
        "--max-tokens",
        "8",
    ]
    done = subprocess.run(generate, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.strip()) > 5


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    out, _ = cli(TINY, "--target", "x86", "--quant", "a8w8", "--dry-run", "-o", tmp_path / "out").communicate()
    assert "28 x A8W8 per-channel symmetric" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no model given"),
        ((TINY, "--target", "sm89", "--portable"), "portable does nothing without a CPU target"),
        (("nowhere", "--target", "x86"), "no model here"),
        ((TINY,), "no target"),
        ((TINY, "--target", "x87"), "unknown target"),
        ((TINY, "--target", "sm70", "--quant", "a8w8"), "no int8 tensor cores"),
        ((TINY, "--target", "x86", "--quant-config", "nowhere.json"), "the file is missing"),
    ],
)
def test_errors_have_no_traceback(arguments: tuple[str | Path, ...], says: str, tmp_path: Path) -> None:
    child = cli(*arguments, "-o", tmp_path / "out")
    _, err = child.communicate()
    assert child.returncode == 1
    assert says in err
    assert "Traceback" not in err
    assert err.endswith("FAILED\n")
    assert not (tmp_path / "out").exists()


def test_a_wrong_command_line_ends_with_failed() -> None:
    child = cli(TINY, "--target", "x86", "--quant", "a16w9")
    _, err = child.communicate()
    assert child.returncode == 2
    assert err.endswith("FAILED\n")


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """256 MB of weights are quantized and written in less than 150 MB."""
    make = "import sys; from pathlib import Path; from instantrt.tools.bench.compile import write_weights\n"
    make += "write_weights(Path(sys.argv[1]), [(8192, 8192), (8192, 8192)])"
    subprocess.run([sys.executable, "-c", make, tmp_path], cwd=ROOT, check=True)
    stage = [sys.executable, "-c", STAGE, tmp_path, "A16W8 per-channel"]
    before, after = map(int, subprocess.run(stage, cwd=ROOT, check=True, capture_output=True).stdout.split())
    assert 0 < after - before < 150
