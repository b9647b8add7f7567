"""Volta: a graph for TensorRT 10.0 to 10.4, from the example model. No such TensorRT is here to parse it.

What is shown: it computes what the whole operators do, in float16; every node is one that parser has; and TensorRT-RTX
builds it for the GPUs that it knows, weights fused where its documents let Volta's TensorRT read them.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from instantrt.compiler import request as request_module
from instantrt.compiler.artifact.manifest import read_manifest
from instantrt.compiler.backend.tensorrt import child as trt_child
from instantrt.compiler.backend.tensorrt.build import EngineSpec, build
from instantrt.compiler.backend.tensorrt.fusion import weight_reads
from instantrt.compiler.backend.tensorrt.kit import read_kit
from instantrt.compiler.compile import compile_model
from instantrt.compiler.plan import plan
from instantrt.compiler.request import Request
from instantrt.compiler.target import CPU_PLUGIN, TARGETS, find_target
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.tensorrt.old_parser import unsupported
from instantrt.plugins.ops import DOMAIN
from instantrt.plugins.weight_only_gemm.op import OP
from tests.conftest import LIBRARY, TINY
from tests.graphs import evaluate, relative

WHOLE = {"Attention", "RMSNormalization", "RotaryEmbedding"}
METHODS = {
    #                 quant    group  how TensorRT-RTX reads it on sm80
    "a16w8":          ("a16w8", None, "FUSED"),
    "a16w8-group":    ("a16w8", 64, "EXPANDED"),
    "a16w4-group":    ("a16w4", 64, "FUSED"),
    "a16w4-group-32": ("a16w4", 32, "EXPANDED"),
}  # fmt: skip


NEWER, VOLTAS = "libinstantrt_plugins.so", "libinstantrt_plugins_sm70.so"
CHOICES = "libinstantrt_plugins_sm70.choices"


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    """A folder as `plugins/lib`, with files that say what they are for."""
    folder = tmp_path / "lib"
    folder.mkdir()
    for name in (NEWER, VOLTAS, CPU_PLUGIN):
        (folder / name).write_bytes(LIBRARY + b"InstantRT serves by " + name.encode() + b"\0...")
    (folder / CHOICES).write_text("# measured")
    return folder


def request(out: Path, *targets: str, **fields: Any) -> Request:
    return Request(TINY, targets, out, **{"builder": "kit", "max_batch": 2, "max_length": 256, **fields})


@pytest.fixture(scope="module", params=METHODS)
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A method, and the folder of its kit for sm70."""
    quant, group, _ = METHODS[request.param]
    out = tmp_path_factory.mktemp("volta") / "out"
    compile_model(Request(TINY, ("sm70",), out, quant=quant, group_size=group, max_batch=2, max_length=256))
    return request.param, out


@pytest.mark.slow
def test_a_kit_holds_only_what_the_old_parser_has(kit: tuple[str, Path]) -> None:
    folder = kit[1] / "sm70"
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(folder / "model.onnx"))
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 21)]
    assert not WHOLE & {node.op_type for node in model.graph.node}
    assert not list(unsupported(gs.import_onnx(model)))
    (artifact,) = read_manifest(kit[1])
    assert (artifact.target, artifact.kind, artifact.limits["cache"]) == ("sm70", "kit", "concat")
    assert read_kit(folder).settings.precision == "float16"
    assert json.loads((folder / "kit.json").read_text())["tensorrt"] == ">=10.0,<10.5"


@pytest.mark.slow
@pytest.mark.parametrize("sm", [75, 80])
def test_tensorrt_rtx_builds_it_with_weights_fused(kit: tuple[str, Path], sm: int, tmp_path: Path) -> None:
    """A sanity check of the form: RTX has no Volta, and Volta's TensorRT may fuse less."""
    method, read = kit[0], read_kit(kit[1] / "sm70")
    if sm == 75 and method != "a16w8":
        pytest.skip("no int4 on sm75, and no weight there is more telling than this one")
    spec = EngineSpec(
        "tensorrt_rtx", read.onnx, tmp_path / "m.engine", tmp_path / "l.txt", read.settings.profiles, (sm,)
    )
    found = {c.linear: c.read.name for c in weight_reads(build(spec).layers.read_text("utf-8"), read.settings.linears)}
    assert len(found) == 16, "q, k and v are one product; gate and up another"
    expected = {"FUSED", "EXPANDED"} if sm == 75 else {METHODS[method][2]}
    assert set(found.values()) == expected


@pytest.mark.slow
def test_it_computes_in_float16_what_the_whole_operators_do(tmp_path: Path) -> None:
    """The graphs for Volta and Turing differ in nothing but these operators. A padded batch, with a past."""
    planned = plan(request(tmp_path, "sm70", "sm75", quant="a16w8", logits="all"))
    whole, decomposed = planned.lowered["sm75"], planned.lowered["sm70"]
    assert {n.op for n in whole.nodes} >= WHOLE
    rng = np.random.default_rng(0)
    batch, new, past = 2, 4, 6
    mask = np.ones((batch, past + new), np.int64)
    mask[1, :3] = 0
    feeds: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, 4000, (batch, new)),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, -new:],
    }
    for tensor in whole.inputs[3:]:
        values = rng.standard_normal((batch, tensor.shape[1], past, tensor.shape[3]))
        feeds[tensor.name] = values.astype(np.float16)
    names = ("logits", "present.0.key", "present.3.value")
    kept = [t.name for t in decomposed.outputs]
    runtime = dict(zip(kept, evaluate(decomposed, feeds, tmp_path), strict=True))
    for name in names:
        want, got = (Evaluation(g, feeds, [name]).peek(name).astype(np.float32) for g in (whole, decomposed))
        assert want.std() > 0.1
        assert relative(got, want) < 2e-3, name
        # ONNX Runtime keeps more bits between nodes. Where it quantizes activations unasked, it is not even near.
        assert relative(runtime[name].astype(np.float32), got) < 4e-3, name


def test_targets_of_old_and_new_releases_do_not_share_a_graph(tmp_path: Path) -> None:
    lowered = plan(request(tmp_path, "sm70", "sm75", quant="a16w8")).lowered
    assert lowered["sm70"].opset == 21
    assert lowered["sm75"].opset == 23


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_cache": "in-place"}, r"--kv-cache in-place is not supported on sm70[^$]*has no TensorScatter"),
        ({"plugin": NEWER}, rf"a plugin library for other targets than sm70[^$]*{VOLTAS}[^$]*{NEWER}"),
    ],
    ids=["cache", "plugin"],
)
def test_what_volta_cannot_have_is_refused_before_any_work(
    fields: dict[str, Any], words: str, libraries: Path, tmp_path: Path
) -> None:
    fields = {name: libraries / value if name == "plugin" else value for name, value in fields.items()}
    with pytest.raises(UserError, match=words):
        request(tmp_path / "out", "sm80", "sm70", **fields)
    request(tmp_path / "out", "sm80", **fields)


def test_auto_takes_each_target_its_library(libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "PACKAGED_PLUGINS", libraries)
    asked = request(tmp_path, "sm70", "sm80", "x86", plugin=Path("auto"))
    found = {t.name: asked.library(t) for t in asked.resolved_targets()}
    assert found == {"sm70": libraries / VOLTAS, "sm80": libraries / NEWER, "x86": libraries / CPU_PLUGIN}
    with pytest.raises(UserError, match=rf"a plugin library for other targets than sm80[^$]*{NEWER}[^$]*{VOLTAS}"):
        request(tmp_path, "sm70", "sm80", plugin=libraries / VOLTAS)
    (libraries / VOLTAS).unlink()
    request(tmp_path, "sm80", "x86", plugin=Path("auto"))
    with pytest.raises(UserError, match="make plugins-sm70 TENSORRT=DIR"):
        request(tmp_path, "sm70", "sm80", plugin=Path("auto"))
    (libraries / CPU_PLUGIN).unlink()
    request(tmp_path, "sm80", "armv9", plugin=Path("auto"))
    with pytest.raises(UserError, match="make plugins-cpu"):
        request(tmp_path, "sm80", "x86", plugin=Path("auto"))


@pytest.mark.parametrize(("content", "found"), [(b"", "no shared"), (b"\x7fELF...", "one that"), (b"{}", "no shared")])
def test_a_file_that_is_no_plugin_library_is_refused(content: bytes, found: str, tmp_path: Path) -> None:
    """The library of kernels alone, say, which has no plugin."""
    (tmp_path / "some.so").write_bytes(content)
    with pytest.raises(UserError, match=f"TensorRT would find no plugin in it[^$]*found: +{found}"):
        request(tmp_path, "sm80", plugin=tmp_path / "some.so")


def test_a_library_that_would_not_see_what_is_asked_of_it_is_refused(libraries: Path, tmp_path: Path) -> None:
    newer = libraries / NEWER
    with pytest.raises(UserError, match=f"{NEWER}: a plugin library that is older than plugin_batch_invariant"):
        request(tmp_path, "sm80", plugin=newer, plugin_batch_invariant=True)
    request(tmp_path, "sm80", plugin=newer)
    newer.write_bytes(newer.read_bytes() + b"batch_invariant\0")
    request(tmp_path, "sm80", plugin=newer, plugin_batch_invariant=True)


@pytest.mark.slow
@pytest.mark.parametrize(("quant", "group"), [("a16w8", None), ("a16w8", 64), ("a16w4", 32), ("a16w4", None)])
def test_a_kit_with_the_plugin(
    quant: str, group: int | None, libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_module, "PACKAGED_PLUGINS", libraries)
    compile_model(request(tmp_path, "sm70", quant=quant, group_size=group, plugin=Path("auto")))
    (artifact,) = read_manifest(tmp_path)
    assert artifact.plugins == (f"sm70/{VOLTAS}",)
    assert (tmp_path / artifact.plugins[0]).read_bytes() == (libraries / VOLTAS).read_bytes()
    assert (tmp_path / "sm70" / CHOICES).read_text() == "# measured"
    assert f"sm70/{CHOICES}" in artifact.digests
    kit = read_kit(tmp_path / "sm70")
    assert [path.name for path in kit.settings.plugins] == [VOLTAS]
    assert f"--dynamicPlugins={VOLTAS}" in json.loads((kit.folder / "kit.json").read_text())["trtexec"]
    model = onnx.load(kit.onnx, load_external_data=False)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 21), (DOMAIN, OP.version)]
    gemms = [node for node in model.graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in gemms] == [OP.name] * 4 * 4, "q, k and v are one product; gate and up another"
    types = {t.name: t.data_type for t in model.graph.initializer}
    assert {types[node.input[2]] for node in gemms} == {onnx.TensorProto.FLOAT16}
    assert not WHOLE & {node.op_type for node in model.graph.node}
    assert not list(unsupported(gs.import_onnx(model)))


def test_a_node_of_another_domain_is_not_taken_for_the_plugin() -> None:
    x, y = gs.Variable("x", np.float16, (1,)), gs.Variable("y", np.float16, (1,))
    reasons = [list(unsupported(gs.Graph([gs.Node(OP.name, "n", {}, [x], [y], domain=d)]))) for d in (DOMAIN, "other")]
    assert [len(each) for each in reasons] == [0, 1]


@pytest.mark.slow
def test_the_plugin_computes_what_native_forms_do(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_module, "PACKAGED_PLUGINS", libraries)
    fields: dict[str, Any] = {"quant": "a16w4", "group_size": 64, "logits": "all"}
    native, plugin = (
        plan(request(tmp_path, "sm70", **fields, plugin=asked)).lowered["sm70"] for asked in (None, Path("auto"))
    )
    assert OP.name in {n.op for n in plugin.nodes} - {n.op for n in native.nodes}
    feeds: dict[str, np.ndarray] = {
        "input_ids": np.array([[7, 11, 13]]),
        "attention_mask": np.ones((1, 3), np.int64),
        "position_ids": np.array([[0, 1, 2]]),
    }
    for tensor in native.inputs[3:]:
        feeds[tensor.name] = np.zeros((1, tensor.shape[1], 0, tensor.shape[3]), np.float16)
    want, got = (Evaluation(g, feeds, ["logits"]).peek("logits").astype(np.float32) for g in (native, plugin))
    assert want.std() > 0.1
    assert relative(got, want) < 4e-3


def test_activations_stay_16_bits_with_the_plugin(libraries: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no int8 tensor cores"):
        plan(request(tmp_path, "sm70", quant="a8w8", plugin=libraries / VOLTAS))


def test_only_volta_is_for_old_releases() -> None:
    assert [t.name for t in TARGETS if not t.whole_operators] == ["sm70"]


@pytest.mark.parametrize(
    ("target", "version", "fits"),
    [
        ("sm70", "10.4.0", True),
        ("sm70", "10.0.1", True),
        ("sm70", "10.5.0", False),
        ("sm70", "11.4.0.106", False),
        ("sm90", "10.15.1.29", True),
        ("sm90", "11.4.0.106", True),
        ("sm90", "10.14.1.48.post1", False),
    ],
)
def test_which_release_builds_for_which_target(target: str, version: str, fits: bool, tmp_path: Path) -> None:
    paths = (tmp_path / "m.onnx", tmp_path / "m.engine", tmp_path / "l.txt")
    spec = EngineSpec("tensorrt", *paths, releases=find_target(target).tensorrt)
    module = SimpleNamespace(__version__=version)
    if fits:
        trt_child.check_version(module, spec)
        return
    with pytest.raises(trt_child.Refused) as caught:
        trt_child.check_version(module, spec)
    assert caught.value.event["refused"] == [f"TensorRT {version}"]
    assert caught.value.event["expected"] == f"TensorRT {find_target(target).tensorrt}"
    assert caught.value.event["fix"] == f"pip install 'tensorrt{find_target(target).tensorrt}'"
