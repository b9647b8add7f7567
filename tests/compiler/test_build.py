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
import onnx
import pytest

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.perplexity import artifact_logits, perplexity_of, text_windows, transformers_logits
from instantrt.compiler.artifact.digest import sha256
from instantrt.compiler.artifact.manifest import read_manifest
from instantrt.compiler.compile import compile_model
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.plan import longest, lower_all, plan
from instantrt.compiler.quant import instant
from instantrt.compiler.quant.config import parse_quant_config
from instantrt.compiler.request import Request
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import PassLog
from instantrt.passes.ort import Preset
from instantrt.tools.bench.compile import STAGE
from tests.commands import invoke
from tests.conftest import ROOT, TEXT, TINY, compiled
from tests.graphs import model_file
from tests.models import make

FLOAT32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def text() -> list[np.ndarray]:
    return text_windows(TINY, TEXT)


@pytest.fixture(scope="module")
def float_perplexity(text: list[np.ndarray]) -> float:
    return perplexity_of(transformers_logits(TINY), text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "percent"),
    [
        ({"quant": "none"}, 0.001),
        ({"quant": "a16w8"}, 0.1),
        ({"quant": "a16w8", "cpu_preset": "fast"}, 0.1),
        ({"quant": "a16w8", "group_size": 32}, 0.1),
        ({"quant": "a16w8", "group_size": 128, "cpu_preset": "exact"}, 0.1),
        ({"quant": "a8w8"}, 0.1),
        ({"quant": "a16w8", "lm_head": "int8", "embeddings": "int8"}, 0.1),
        ({"quant": "a16w4", "group_size": 32}, 0.6),
        ({"quant": "a16w4", "group_size": 128}, 1.5),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else str(v),
)
def test_perplexity_stays_near_float(
    tmp_path: Path, text: list[np.ndarray], float_perplexity: float, fields: Any, percent: float
) -> None:
    compiled(tmp_path, **fields)
    value = perplexity_of(artifact_logits(tmp_path), text)
    assert abs(value / float_perplexity - 1) * 100 < percent


@pytest.mark.slow
def test_the_perplexity_bound_bites(tmp_path: Path, text: list[np.ndarray], float_perplexity: float) -> None:
    """Per-channel uint4 by the plain formula, which is that much worse, breaks the 8-bit bound."""
    compiled(tmp_path, quant="a16w4", group_size=-1, search="none")
    assert perplexity_of(artifact_logits(tmp_path), text) / float_perplexity - 1 > 0.001


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        compiled(tmp_path / name, quant="a16w8", targets=("x86", "armv9"))
    a, b = (read_manifest(tmp_path / name) for name in ("a", "b"))
    assert a == b
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()
    files = json.loads((tmp_path / "a/manifest.json").read_text())["artifacts"][0]["source"]["files"]
    assert set(files) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    assert all(sha256(TINY / name) == digest for name, digest in files.items())
    for artifact in a:
        assert all(sha256(tmp_path / "a" / file) == digest for file, digest in artifact.digests.items())


def test_an_artifact_does_not_depend_on_what_is_compiled_beside_it(tmp_path: Path) -> None:
    """x86 stores float32 scales, sm75 float16, sm89 bfloat16: codes are computed against each one's own."""

    def files(*targets: str) -> dict[str, str]:
        out = tmp_path / "-".join(targets)
        builder = {} if targets == ("x86",) else {"builder": "kit"}
        compile_model(Request(TINY, targets, out, quant="a16w8", **builder))
        return {str(p.relative_to(out)): sha256(p) for p in out.glob("*/*")}

    assert files("x86", "sm75", "sm89") == files("x86") | files("sm75") | files("sm89")


def test_tables_keep_their_sixteen_bits(tmp_path: Path) -> None:
    """Two float tables of 4096 x 256: 2 bytes an element in the artifact, 1 unless the head is to stay float."""
    sizes = {}
    for name, fields in {"stored": {"lm_head": "float"}, "int8": {}}.items():
        compiled(tmp_path / name, quant="a16w8", group_size=64, **fields)
        sizes[name] = (tmp_path / name / "x86/model.onnx.data").stat().st_size
    table = 4096 * 256
    assert sizes["stored"] - sizes["int8"] == pytest.approx(2 * table, rel=0.1)


def places(file: Path, op: str) -> list[tuple[str, ...]]:
    """(offset, length) in the data file of the last node's constants, by the order of its inputs, widened ones too."""
    graph = onnx.load(file, load_external_data=False).graph
    held = {t.name: tuple(e.value for e in t.external_data[1:]) for t in graph.initializer}
    held |= {n.output[0]: held[n.input[0]] for n in graph.node if n.op_type == "Cast" and n.input[0] in held}
    return [held[name] for name in [n for n in graph.node if n.op_type == op][-1].input if name in held]


@pytest.mark.parametrize("preset", ["exact", "fast"])
def test_a_tied_table_is_written_once(tmp_path: Path, preset: Preset) -> None:
    """By both operators that read it, which the smoke run shows to be right; an untied model has two."""
    make("llama-tied", tmp_path / "tied")
    make("llama", tmp_path / "untied")
    sizes = {}
    for name in ("tied", "untied"):
        request = Request(tmp_path / name, ("x86",), tmp_path / f"{name}-out", quant="a16w8", group_size=32)
        request = replace(request, lm_head="int8", embeddings="int8", cpu_preset=preset)
        compile_model(request)
        file = request.out / "x86/model.onnx"
        head, table = places(file, "MatMulNBits"), places(file, "GatherBlockQuantized")
        assert len(head) == len(table) == 3
        assert (head == table) is (name == "tied")
        sizes[name] = file.with_suffix(".onnx.data").stat().st_size
        kept = plan(replace(request, lm_head="float", embeddings="stored"))
        assert sizes[name] < kept.size("x86")
        assert not kept.notes
        assert bool(plan(replace(request, lm_head="float")).notes) is (
            name == "tied"
        )  # of both kinds: it is there twice
    assert sizes["untied"] - sizes["tied"] == 12288  # the codes of 160 x 64, in whole pages


def test_ignored_layers_stay_float(tmp_path: Path) -> None:
    planned = compiled(tmp_path, quant="a16w8", ignore=("*.down_proj", "model.layers.0.*"))
    left = [path for path, d in planned.twins["x86"].decisions.items() if not isinstance(d, QuantTensor)]
    assert len(left) == 3 + 7


def test_a_group_that_fits_no_layer_is_refused_by_the_config_alone(tmp_path: Path) -> None:
    """Without weights or a model: nothing was exported."""
    shutil.copy(TINY / "config.json", tmp_path)
    for size, what, expected, fix in (
        (96, "does not divide the input width", "a divisor of 256", "128, 64, 32, -1 (per channel)"),
        (7, "does not divide the input width", "a divisor of 256 and of 768", "128, 64, 32, -1 (per channel)"),
        (8, "is one that no operator has", "a multiple of 16", "128, 64, 32, -1 (per channel)"),
    ):
        with pytest.raises(UserError, match=f"group_size {what}") as caught:
            compile_model(Request(tmp_path, ("x86",), tmp_path / "o", quant="a16w8", group_size=size))
        assert caught.value.where.startswith("config.json, hidden_size")
        assert (caught.value.expected, caught.value.found) == (expected, f"group_size {size}")
        assert caught.value.fix == f"--group-size {fix}, or --ignore some layers"


def test_a_group_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """By layer, where what is ignored decides."""
    with pytest.raises(UserError, match=r"group_size does not divide") as caught:
        compiled(tmp_path, quant="a16w8", group_size=96, ignore=("lm_head",))
    assert caught.value.where == "model.layers.0.self_attn.q_proj, and 23 more"  # down_proj is 768 wide
    assert caught.value.fix == "--group-size 128, 64, 32, -1 (per channel)"  # too many kinds of layers to ignore
    with pytest.raises(UserError) as caught:
        compiled(tmp_path, quant="a16w8", group_size=512, ignore=("*attn*", "*gate_proj", "*up_proj"))
    assert caught.value.fix.endswith("or --ignore 'model.layers.*.mlp.down_proj'")
    with pytest.raises(UserError, match=r"no operator has") as caught:
        compiled(tmp_path, quant="a16w8", group_size=8, ignore=("lm_head",))
    assert caught.value.where == "model.layers.0.self_attn.q_proj, and 27 more"
    assert "--ignore" not in caught.value.fix
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
    q = instant.instant(replace(found, rows=tensors[name]), config, FLOAT32)
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


def test_a_full_disk_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(UserError, match="could not be written"):
        compiled(small_disk / "out", quant="a16w8")
    assert list(small_disk.iterdir()) == []


def cli(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "instantrt", "compile", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def small_model(folder: Path) -> Path:
    """One linear, for what does not depend on the model: it is there without an export, nor an import of torch."""
    return model_file(folder / "small.onnx", "y = MatMul(x, w)", {"w": np.ones((64, 64), np.float32)})


@pytest.mark.slow
@pytest.mark.parametrize(("model", "number"), [("checkpoint", signal.SIGINT), ("file", signal.SIGTERM)])
def test_an_interrupted_compile_leaves_nothing(tmp_path: Path, model: str, number: signal.Signals) -> None:
    """Stopped while it writes, slowed down so that the signal finds it there."""
    source = TINY if model == "checkpoint" else small_model(tmp_path)
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "import instantrt.compiler.backend.onnx_writer as writer\n"
        "from instantrt.tools.cli.start import compile_main\n"
        "write = writer.write_source\n"
        "def slow(*a):\n    print('in a tensor', flush=True); time.sleep(2); write(*a)\n"
        "writer.write_source = slow\n"
        "compile_main()\n"
    )
    command = [sys.executable, script, source, "--target", "x86", "--quant", "a16w8", "-o", tmp_path / "out"]
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


@pytest.mark.slow
def test_the_command_compiles_explains_and_generates(tmp_path: Path) -> None:
    out, err = cli(TINY, "--target", "x86", "--quant", "a16w8", "--explain", "-o", tmp_path).communicate()
    assert err == ""
    assert "PASSED" in out
    assert "lm_head" in out
    generate = [sys.executable, "-m", "instantrt", "generate", tmp_path, "--prompt", "Once upon", "--max-tokens", "8"]
    done = subprocess.run(generate, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.strip()) > 5


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = invoke("compile", TINY, "--target", "x86", "--quant", "a8w8", "--dry-run", "-o", tmp_path / "out")
    assert "28 x A8W8 per-channel symmetric" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((TINY, "--target", "sm89", "--portable"), "portable does nothing without a CPU target"),
        (("nowhere", "--target", "x86"), "no model here"),
        ((TINY,), "no target"),
        ((TINY, "--target", "x87"), "unknown target"),
        (("MODEL", "--target", "sm70", "--quant", "a8w8"), "no int8 tensor cores"),
        ((TINY, "--target", "x86", "--quant-config", "nowhere.json"), "the file is missing"),
    ],
)
def test_errors_have_no_traceback(arguments: tuple[str | Path, ...], says: str, tmp_path: Path) -> None:
    words = (small_model(tmp_path) if word == "MODEL" else word for word in arguments)
    child = cli(*words, "-o", tmp_path / "out")
    _, err = child.communicate()
    assert child.returncode == 1
    assert says in err
    assert "Traceback" not in err
    assert err.endswith("FAILED\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_wrong_command_line_ends_with_failed() -> None:
    child = cli(TINY, "--target", "x86", "--quant", "a16w9")
    _, err = child.communicate()
    assert child.returncode == 2
    assert err.endswith("FAILED\n")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """256 MB of weights are quantized and written in less than 150 MB."""
    make = "import sys; from pathlib import Path; from instantrt.tools.bench.layers import write_weights\n"
    make += "write_weights(Path(sys.argv[1]), [(8192, 8192), (8192, 8192)])"
    subprocess.run([sys.executable, "-c", make, tmp_path], cwd=ROOT, check=True)
    stage = [sys.executable, "-c", STAGE, tmp_path, "A16W8 per-channel"]
    before, after = map(int, subprocess.run(stage, cwd=ROOT, check=True, capture_output=True).stdout.split())
    assert 0 < (after - before) // 1024 < 150


def test_targets_share_a_lowered_graph_where_they_share_a_twin() -> None:
    """Where each has formats of its own, as with a bound on size, the second's are not the first's."""
    request = Request(TINY, ("sm80", "sm90"), Path("out"), quant="a16w8", builder="kit")
    planned = plan(request)
    assert planned.lowered["sm80"] is planned.lowered["sm90"]
    twins = {**planned.twins, "sm90": replace(planned.twins["sm90"])}
    longest_sequence = longest(request, planned.model)
    lowered = lower_all(twins, planned.types, request, planned.limits, longest_sequence, PassLog())
    assert lowered["sm80"] is not lowered["sm90"]
