"""Checkpoints of the real libraries, compiled: the artifact holds their codes and says what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from instantrt.compiler.accuracy.perplexity import Logits, artifact_logits, perplexity_of, text_windows
from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.inspect import inspect
from instantrt.compiler.plan import Plan
from instantrt.compiler.request import Request
from instantrt.passes.core.lazy import Array, whole
from instantrt.passes.core.quant import QuantTensor, quantize_asymmetric
from instantrt.passes.core.rewrite import Reject
from instantrt.passes.qdq.join_linears import parts_of
from instantrt.tools.bench.formats import logits_of, reference_model
from tests.checkpoints import DOWN_PROJ, HERE, NAMES, Q_PROJ, TINY, gptq_tensors, whole_checkpoint
from tests.commands import invoke
from tests.conftest import planned_and_written

TEXT = TINY.parent / "text" / "evaluation.txt"


@pytest.fixture(scope="module")
def parts() -> list[Array]:
    return text_windows(TINY, TEXT)[:4]


MODES = {"gptq-int8-perchannel": "A8W8", "ct-w8a8-dyn": "A8W8", "ct-w8a8-static": "A8W8", "ct-w8a16": "A16W8"}


@dataclass(frozen=True)
class Compiled:
    name: str
    planned: Plan
    out: Path


@pytest.fixture(scope="module", params=NAMES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Each library's checkpoint, compiled for x86 as it is."""
    folder = tmp_path_factory.mktemp(request.param)
    asked = Request(whole_checkpoint(request.param, folder / "model"), ("x86",), folder / "out", cpu_preset="exact")
    return Compiled(request.param, planned_and_written(asked), folder / "out")


def reference_logits(planned: Plan) -> Logits:
    """Of the dequantized weights; where tokens become int8, they are rounded as they are when they run."""
    from tests.corpus.reference import int8_tokens

    model = reference_model(planned)
    for path, quant in planned.twins["x86"].quantized.items():
        if quant.activations == "int8":
            model.get_submodule(path).register_forward_pre_hook(int8_tokens)
    return logits_of(model)


@pytest.mark.slow
def test_perplexity_is_that_of_the_dequantized_weights(compiled: Compiled, parts: list[Array]) -> None:
    modes = {q.mode for q in compiled.planned.twins["x86"].quantized.values()}
    assert modes == {MODES.get(compiled.name, "A16W4")}
    expected = perplexity_of(reference_logits(compiled.planned), parts)
    found = perplexity_of(artifact_logits(compiled.out), parts)
    assert abs(found / expected - 1) < 2e-4, f"{found} is not {expected}"


def test_the_artifact_holds_the_codes_of_the_checkpoint(compiled: Compiled) -> None:
    tensors = {name: whole(t) for name, t in read_checkpoint(HERE / compiled.name).items()}
    written = {t.name: t for t in onnx.load(compiled.out / "x86" / "model.onnx").graph.initializer}
    quantized = compiled.planned.twins["x86"].quantized
    assert len(quantized) == 7
    for path in quantized:
        expected = stored_codes(tensors, path)
        order = stored_order(tensors, path)
        if path.endswith(("gate_proj", "up_proj")):  # their rows come in the order that down_proj wants
            expected = expected[stored_order(tensors, DOWN_PROJ)]
        found = written_codes(written, path, quantized)
        np.testing.assert_array_equal(found, expected[:, order], err_msg=path)


def test_an_inspection_knows_the_size(compiled: Compiled) -> None:
    estimate = inspect(compiled.planned.model.folder).bytes_on["onnxruntime"]
    assert abs(compiled.planned.size("x86") / estimate - 1) < 0.1


def stored_codes(tensors: dict[str, Array], path: str) -> Array:
    """Codes [N, K] as the formats' documents say, field by field: not by our readers."""
    if (weight := tensors.get(f"{path}.weight")) is not None:
        return (weight.astype(np.int16) + 128).astype(np.uint8)
    packed = tensors.get(f"{path}.weight_packed")
    words = (tensors[f"{path}.qweight"] if packed is None else packed).astype(np.int64)
    if packed is not None:
        bits = 32 * words.shape[1] // int(tensors[f"{path}.weight_shape"][1])
        fields = [(words >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)]
        return np.stack(fields, 2).reshape(len(words), -1)
    k = len(tensors[f"{path}.g_idx"]) if f"{path}.g_idx" in tensors else len(words)
    if len(words) == k:  # AWQ: the columns of a word in its own order
        fields = [(words >> shift) & 15 for shift in range(0, 32, 4)]
        return np.stack([fields[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)], 2).reshape(k, -1).T
    bits = 32 * len(words) // k
    fields = [(words >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)]
    return np.stack(fields, 1).reshape(k, -1).T


def stored_order(tensors: dict[str, Array], path: str) -> Array:
    """The inputs by group, groups by their first input."""
    g_idx = tensors.get(f"{path}.g_idx")
    if g_idx is None:
        return np.arange(768 if path == DOWN_PROJ else 256)
    return np.concatenate([np.flatnonzero(g_idx == g) for g in dict.fromkeys(g_idx.tolist())])


def written_codes(written: dict[str, onnx.TensorProto], path: str, quantized: Mapping[str, QuantTensor]) -> Array:
    """Codes [N, K] of MatMulNBits, four or eight bits, or of MatMulIntegerToFloat; layers of one x may be joined."""
    (name,) = (n for n in written if n.endswith((".b", ".codes_int8")) and path in parts_of(n.rpartition(".")[0]))
    parts, codes = parts_of(name.rpartition(".")[0]), onnx.numpy_helper.to_array(written[name])
    if name.endswith(".codes_int8"):
        codes = codes.T.view(np.uint8) ^ 0x80
    n, k = quantized[path].shape
    start = sum(quantized[part].shape[0] for part in parts[: parts.index(path)])
    codes = codes[start : start + n]
    if codes.size == k * n:
        return codes.reshape(n, k)
    return np.stack([codes & 15, codes >> 4], 3).reshape(n, k)


def requantized(path: str, bits: int, group: int) -> dict[str, Array]:
    """A float layer of the example model as GPTQ tensors, its zero points off the centre."""
    w = whole(read_checkpoint(TINY)[f"{path}.weight"]).astype(np.float32)
    block = quantize_asymmetric(w.reshape(len(w), -1, group).copy(), bits, np.dtype(np.float16))
    return gptq_tensors(path, block.codes.T, block.zero.T, block.scale.T, bits)


def test_overrides_a_float_module_and_a_quantized_head(tmp_path: Path, parts: list[Array]) -> None:
    o_proj = Q_PROJ.replace("q_proj", "o_proj")

    def change(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        rules = {
            "-:.*o_proj": {},
            "+:.*down_proj": {"bits": 8, "group_size": -1, "sym": False},
            "lm_head": {"sym": False},
        }
        config["quantization_config"] |= {"dynamic": rules, "lm_head": True}
        for name in [n for n in tensors if n.startswith((o_proj, DOWN_PROJ, "lm_head."))]:
            del tensors[name]
        tensors[f"{o_proj}.weight"] = whole(read_checkpoint(TINY)[f"{o_proj}.weight"])
        tensors |= requantized(DOWN_PROJ, 8, 768) | requantized("lm_head", 4, 128)

    folder = whole_checkpoint("gptq-int4-g128-sym", tmp_path / "m", change)
    planned = planned_and_written(Request(folder, ("x86",), tmp_path / "o", cpu_preset="exact"))
    kinds = {path: str(decision) for path, decision in planned.twins["x86"].decisions.items()}
    assert kinds[DOWN_PROJ] == "A16W8 per-channel asymmetric"
    assert kinds["lm_head"] == "A16W4 group 128 asymmetric"
    assert isinstance(planned.twins["x86"].decisions[o_proj], Reject)
    expected = perplexity_of(reference_logits(planned), parts[:2])
    found = perplexity_of(artifact_logits(tmp_path / "o"), parts[:2])
    assert abs(found / expected - 1) < 5e-4, f"{found} is not {expected}"


def test_groups_of_eight_bits_meet_int8_tokens_exactly(tmp_path: Path, parts: list[Array]) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        config["quantization_config"] |= {"bits": 8, "sym": False}
        for path in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
            tensors |= requantized(path, 8, 128)

    folder = whole_checkpoint("gptq-int4-g128-sym", tmp_path / "m", change)
    planned = planned_and_written(Request(folder, ("x86",), tmp_path / "o", cpu_preset="exact"))
    kinds = {str(q) for q in planned.twins["x86"].quantized.values()}
    assert kinds == {"A8W8 group 128 asymmetric"}
    assert sum(node.op == "Scan" for node in planned.lowered["x86"].nodes) == 4  # q, k, v and gate, up joined
    expected = perplexity_of(reference_logits(planned), parts[:2])
    found = perplexity_of(artifact_logits(tmp_path / "o"), parts[:2])
    assert abs(found / expected - 1) < 2e-4, f"{found} is not {expected}"


def test_explain_says_where_each_order_went(tmp_path: Path) -> None:
    folder = whole_checkpoint("gptq-int4-g128-desc_act", tmp_path / "m")
    arguments = ["compile", folder, "--target", "x86", "--explain", "--dry-run", "-o", tmp_path / "o"]
    shown = " ".join(invoke(*arguments).output.replace("│", " ").split())
    assert shown.count("one Gather: the channels") == 3  # q, k and v share one; gate and up another; o has its own
    assert "folded into the output channels of" in shown


@pytest.mark.parametrize(("name", "quant", "modes"), [
    ("gptq-int4-g128-desc_act", "a8w4", {"A8W4"}),
    ("gptq-int4-g32-asym", "a8w4", {"A8W4"}),
    ("awq-int4-g128", "a8w4", {"A8W4"}),
    ("gptq-int8-perchannel", "a16w8", {"A16W8"}),
    ("ct-w8a8-dyn", "a16w8", {"A16W8"}),
])  # fmt: skip
def test_the_other_activations_on_request(
    name: str, quant: str, modes: set[str], tmp_path: Path, parts: list[Array]
) -> None:
    model = whole_checkpoint(name, tmp_path / "m")
    asked = Request(model, ("x86",), tmp_path / "o", quant=quant, cpu_preset="exact")
    planned = planned_and_written(asked)
    assert {q.mode for q in planned.twins["x86"].quantized.values()} == modes
    expected = perplexity_of(reference_logits(planned), parts[:2])
    found = perplexity_of(artifact_logits(tmp_path / "o"), parts[:2])
    assert abs(found / expected - 1) < 2e-4, f"{found} is not {expected}"


@pytest.mark.parametrize("first", ["self_attn", "mlp"])
def test_schemes_with_and_without_quantized_activations(first: str, tmp_path: Path, parts: list[Array]) -> None:
    """Layers meet int8 activations where the checkpoint was made for them, in whichever order the schemes come."""

    def mix(config: dict[str, Any], tensors: dict[str, Array]) -> None:  # noqa: ARG001  (its weights stay)
        stored = config["quantization_config"]
        (both,) = stored["config_groups"].values()
        groups = {
            "self_attn": both | {"targets": ["re:.*self_attn.*"]},
            "mlp": both | {"targets": ["re:.*mlp.*"], "input_activations": None},
        }
        stored["config_groups"] = {name: groups[name] for name in sorted(groups, reverse=first == "self_attn")}

    model = whole_checkpoint("ct-w8a8-dyn", tmp_path / "m", mix)
    planned = planned_and_written(Request(model, ("x86",), tmp_path / "o"))
    modes = {(p.split(".")[3], q.mode) for p, q in planned.twins["x86"].quantized.items()}
    assert modes == {("self_attn", "A8W8"), ("mlp", "A16W8")}
    expected = perplexity_of(reference_logits(planned), parts[:2])
    assert abs(perplexity_of(artifact_logits(tmp_path / "o"), parts[:2]) / expected - 1) < 2e-4
