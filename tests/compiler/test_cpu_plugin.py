"""`--plugin` for a CPU: artifacts on CpuGemm and CpuRows, from the compilation to what they generate."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from instantrt import LLM, Embedder, load_artifact
from instantrt.compiler.artifact.manifest import read_manifest
from instantrt.compiler.compile import compile_model
from instantrt.compiler.request import Request
from instantrt.compiler.serving.runtime.onnx_engine import SharedEngine
from instantrt.compiler.target import CPU_PLUGIN
from instantrt.passes.core.errors import UserError
from instantrt.plugins.cpu.attention import OP as ATTENTION
from instantrt.plugins.cpu.op import GEMM, ROWS
from instantrt.plugins.ops import DOMAIN
from tests.checkpoints import whole_checkpoint
from tests.commands import invoke, refused
from tests.conftest import TINY, plugin_library
from tests.models import make
from tests.once import made_once

PROMPTS = ["Once upon a time", "The list of", "In the history of"]
INTEGERS = {"MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat"}  # ONNX Runtime's own


def graph_of(out: Path, target: str = "x86") -> onnx.GraphProto:
    return onnx.load(out / target / "model.onnx", load_external_data=False).graph


def ours(graph: onnx.GraphProto, op: str = GEMM.name) -> list[onnx.NodeProto]:
    return [node for node in graph.node if (node.domain, node.op_type) == (DOMAIN, op)]


def values(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def generated(out: Path) -> list[tuple[int, ...]]:
    with LLM(out, threads=1) as llm:
        return [each.tokens for each in llm.generate(PROMPTS, max_tokens=24, min_tokens=24)]


@pytest.fixture(scope="session")
def with_kernels(tmp_path_factory: pytest.TempPathFactory, cpu_library: Path) -> Path:
    """The output folder of the example model for x86 with 4-bit weights, on the kernels."""

    def write(new: Path) -> None:
        compile_model(Request(TINY, ("x86",), new / "out", quant="a16w4", cpu_preset="exact", plugin=cpu_library))

    return made_once(tmp_path_factory, "with_kernels", write) / "out"


def test_the_library_lies_beside_the_model(with_kernels: Path, cpu_library: Path) -> None:
    (artifact,) = read_manifest(with_kernels)
    assert artifact.plugins == (f"x86/{CPU_PLUGIN}",)
    assert (with_kernels / "x86" / CPU_PLUGIN).read_bytes() == cpu_library.read_bytes()
    assert f"x86/{CPU_PLUGIN}" in artifact.digests


def test_every_linear_is_ours(with_kernels: Path) -> None:
    """Seven of each of four layers: gate and up are one, query, key and value are joined; and the head."""
    graph = graph_of(with_kernels)
    assert not INTEGERS & {node.op_type for node in graph.node}
    nodes = {node.name: node for node in ours(graph)}
    assert len(nodes) == 4 * 4 + 1
    mlp = [values(nodes[f"model.layers.{i}.mlp.(gate_proj+up_proj)"]) for i in range(4)]
    assert [(v["gated"], v["activation"]) for v in mlp] == [(1, 1)] * 4
    assert {values(node)["activations"] for node in nodes.values()} == {1}, "exact: 16 bits"
    residual = [name for name, node in nodes.items() if len(node.input) == 5]
    assert len(residual) == 8, "what comes behind the attention and behind the MLP"
    assert len(ours(graph, ATTENTION.name)) == 4


@pytest.mark.parametrize("quant", ["a16w8", "a16w4", "a8w8"])
def test_it_generates_what_the_stock_artifact_does(quant: Any, tmp_path: Path, cpu_library: Path) -> None:
    for name, library in (("stock", None), ("ours", cpu_library)):
        request = Request(TINY, ("x86",), tmp_path / name, quant=quant, cpu_preset="exact", plugin=library)
        compile_model(request)
    assert not ours(graph_of(tmp_path / "stock"))
    assert {values(n)["activations"] for n in ours(graph_of(tmp_path / "ours"))} >= {2 if quant == "a8w8" else 1}
    assert generated(tmp_path / "ours") == generated(tmp_path / "stock")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq-int4-g128-asym-v2", "gptq-int8-perchannel", "gptq-int4-g128-desc_act"])
def test_a_gptq_checkpoint(name: str, tmp_path: Path, cpu_library: Path) -> None:
    """Its codes, zero points and scales as they are stored. The fast preset is 3e-3 off."""
    model, logits = whole_checkpoint(name, tmp_path / "model"), {}
    for out, library in (("stock", None), ("ours", cpu_library)):
        compile_model(Request(model, ("x86-avx2",), tmp_path / out, cpu_preset="exact", plugin=library))
        (artifact,) = read_manifest(tmp_path / out)
        libraries = [tmp_path / out / name for name in artifact.plugins]
        engine = SharedEngine(tmp_path / out / artifact.path, 1, 64, libraries=libraries)
        logits[out] = engine.prefill(0, np.array([5, 77, 1234, 900, 31, 8, 400]), 0)
    nodes = ours(graph_of(tmp_path / "ours", "x86-avx2"))
    assert {values(node)["scale_type"] for node in nodes} == {1}, "float16"
    assert np.linalg.norm(logits["ours"] - logits["stock"]) < 1e-4 * np.linalg.norm(logits["stock"])


def test_an_encoder_embeds(embedding: Path, tmp_path: Path, cpu_library: Path) -> None:
    model = embedding.parent / "letters"
    request = Request(model, ("x86",), tmp_path / "ours", quant="a16w8", cpu_preset="exact", plugin=cpu_library)
    compile_model(request)
    graph = graph_of(tmp_path / "ours")
    assert len(ours(graph)) == 2 * 4, "two layers: two in the attention, of which one is three, two behind"
    compile_model(Request(model, ("x86",), tmp_path / "float"))
    texts = ["a", "The boat is late again.", "An old net lies on the quay, and nobody mends it."]
    with Embedder(tmp_path / "ours") as kernels, Embedder(embedding) as stock, Embedder(tmp_path / "float") as wide:
        got, other, exact = kernels.encode(texts), stock.encode(texts), wide.encode(texts)
    assert got.shape == exact.shape
    assert np.abs(got - exact).max() <= 1.1 * np.abs(other - exact).max()


@pytest.mark.slow
def test_a_tied_model_has_its_table_once(tmp_path: Path, cpu_library: Path) -> None:
    """By both operators that read it, which the smoke run shows to be right; an untied model has two."""
    sizes = {}
    for name in ("llama-tied", "llama"):
        make(name, tmp_path / name)
        out = tmp_path / f"{name}-out"
        request = Request(tmp_path / name, ("x86",), out, quant="a16w8", group_size=32, plugin=cpu_library)
        compile_model(replace(request, lm_head="int8", embeddings="int8"))
        graph = graph_of(out)
        tables, shared = (
            ours(graph, ROWS.name),
            [list(n.input[1:3]) for n in ours(graph) if values(n)["activations"] == 1],
        )
        assert [list(table.input[1:3]) for table in tables] == (shared if name == "llama-tied" else [])
        sizes[name] = (out / "x86" / "model.onnx.data").stat().st_size
    codes, scales = 160 * 64, 160 * 2
    assert codes + scales <= sizes["llama"] - sizes["llama-tied"] <= codes + 6 * scales + 3 * 4096, "in whole pages"


def test_check_runs_it(with_kernels: Path) -> None:
    done = invoke("check", with_kernels)
    assert done.exit_code == 0, done.output
    assert "a model for ONNX Runtime" in done.output


def test_a_changed_library_is_refused_before_it_is_loaded(with_kernels: Path, tmp_path: Path) -> None:
    """What is there now would be another error, were it loaded."""
    shutil.copytree(with_kernels, tmp_path / "out")
    (tmp_path / "out" / "x86" / CPU_PLUGIN).write_bytes(b"no library at all")
    for opened in (lambda: LLM(tmp_path / "out").start(), lambda: load_artifact(tmp_path / "out")):
        with pytest.raises(UserError, match="this is not what compile wrote") as caught:
            opened()
        assert caught.value.where.endswith(CPU_PLUGIN)
    assert "this is not what compile wrote" in refused("check", tmp_path / "out").what


@pytest.mark.parametrize(
    ("library", "targets", "message"),
    [
        ("cpu", ("armv9",), "--plugin does nothing without a target that the library has kernels for"),
        ("gpu", ("x86",), "--plugin does nothing without a target that the library has kernels for"),
        ("cpu", ("sm89",), "a plugin library for other targets than sm89"),
        ("cpu", ("x86", "sm70"), "a plugin library for other targets than sm70"),
    ],
)
def test_where_it_would_do_nothing_it_is_refused(
    library: str, targets: tuple[str, ...], message: str, cpu_library: Path, tmp_path: Path
) -> None:
    """armv9: the library is for x86_64. One for GPUs is no reason to refuse x86 beside a GPU, but it alone is."""
    (tmp_path / "gpu").mkdir()
    file = cpu_library if library == "cpu" else plugin_library(tmp_path / "gpu")
    words = [word for target in targets for word in ("--target", target)]
    error = refused("compile", TINY, *words, "--plugin", file, "--quant", "a16w8", "-o", tmp_path / "out")
    assert re.match(message, error.what), error
    assert not (tmp_path / "out").exists()
