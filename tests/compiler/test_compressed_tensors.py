"""compressed-tensors and plain int8: every layout they write, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.quant import compressed, plain, readers, stored
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Reject
from instantrt.tools.bench.synthetic import write_safetensors
from tests.checkpoints import decoded, weight

PATH = "model.layers.0.mlp.up_proj"
N, K, GROUP = 20, 48, 16
RANDOM = np.random.default_rng(8)
BFLOAT16 = ml_dtypes.bfloat16


def pack(signed: Array, bits: int) -> Array:
    """Signed [R, C] -> int32 [R, ceil(C * bits / 32)], as compressed_tensors.compressors.pack_to_int32."""
    per = 32 // bits
    fields = (signed.astype(np.int64) + (1 << (bits - 1))).astype(np.uint64)
    fields = np.pad(fields, ((0, 0), (0, -fields.shape[1] % per))).reshape(len(fields), -1, per)
    return (fields << (bits * np.arange(per, dtype=np.uint64))).sum(axis=2).astype(np.uint32).view(np.int32)


def scheme(bits: int, strategy: str, form: str, *, symmetric: bool = True, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric, "dynamic": False}
    weights |= {"group_size": GROUP if strategy == "group" else None}
    group = {"targets": ["Linear"], "format": form, "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, **changes}


def reader_of(raw: dict[str, Any]) -> Any:
    return readers.announced_reader(Path("nowhere"), {"quantization_config": raw})


def read(folder: Path, parts: dict[str, Array], reader: Any) -> QuantTensor | Reject:
    write_safetensors(folder / "model.safetensors", {f"{PATH}.{name}": array for name, array in parts.items()})
    return reader.read(stored.StoredLayer(PATH, (N, K), read_checkpoint(folder)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights(bits: int, strategy: str, symmetric: bool, order: bool, tmp_path: Path) -> None:
    groups = K // GROUP if strategy == "group" else 1
    top = 1 << (bits - 1)
    q, zero = RANDOM.integers(-top, top, (N, K)), RANDOM.integers(-top, top, (N, groups))
    zero = zero * 0 if symmetric else zero
    scale = (RANDOM.random((N, groups)) + 0.1).astype(BFLOAT16)
    g_idx = RANDOM.permutation(np.arange(K) % groups) if order else np.arange(K) // (K // groups)
    parts = {"weight_packed": pack(q, bits), "weight_scale": scale, "weight_shape": np.array([N, K])}
    if not symmetric:
        parts["weight_zero_point"] = np.ascontiguousarray(pack(zero.T, bits).T)
    if order:
        parts["weight_g_idx"] = g_idx.astype(np.int32)
    quant = read(tmp_path, parts, reader_of(scheme(bits, strategy, "pack-quantized", symmetric=symmetric)))
    assert isinstance(quant, QuantTensor)
    assert quant.symmetric is symmetric
    expected = (q - zero[:, g_idx]) * scale.astype(np.float32)[:, g_idx]
    np.testing.assert_array_equal(weight(quant), expected.astype(np.float32))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
def test_weights_of_one_byte(strategy: str, symmetric: bool, tmp_path: Path) -> None:
    groups = K // GROUP if strategy == "group" else 1
    rows = 1 if strategy == "tensor" else N
    q = RANDOM.integers(-128, 128, (N, K), dtype=np.int8)
    zero = RANDOM.integers(-128, 128, (rows, groups), dtype=np.int8) * np.int8(not symmetric)
    scale = (RANDOM.random((rows, groups)) + 0.1).astype(np.float32)
    parts = {"weight": q, "weight_scale": scale[0] if strategy == "tensor" else scale}
    if not symmetric:
        parts["weight_zero_point"] = zero[0] if strategy == "tensor" else zero
    quant = read(tmp_path, parts, reader_of(scheme(8, strategy, "int-quantized", symmetric=symmetric)))
    assert isinstance(quant, QuantTensor)
    wide = [np.broadcast_to(np.repeat(each, K // groups, axis=1), (N, K)) for each in (zero, scale)]
    np.testing.assert_array_equal(weight(quant), (q.astype(np.int32) - wide[0]).astype(np.float32) * wide[1])


def test_activations_and_their_notes() -> None:
    token = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token", "symmetric": True}
    raw = scheme(8, "channel", "int-quantized")
    group = raw["config_groups"]["group_0"]
    assert reader_of(raw).activations == "float"
    group["input_activations"] = token
    assert (reader_of(raw).activations, reader_of(raw).notes) == ("int8", ())
    group["input_activations"] = token | {"dynamic": False, "strategy": "tensor"}
    assert "static activation scales" in reader_of(raw).notes[0]
    for refused in ({"type": "float"}, {"num_bits": 4}):
        group["input_activations"] = token | refused
        with pytest.raises(UserError, match="input_activations"):
            reader_of(raw)
    group["input_activations"] = None
    for key, words in (("output_activations", "quantized outputs"), ("rotation", "keys of a config group")):
        raw["config_groups"]["group_0"] = {**group, key: token}
        with pytest.raises(UserError, match=words):
            reader_of(raw)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "float-quantized"}, "format"),
        ({"num_bits": 3}, "num_bits"),
        ({"type": "float"}, "static integers"),
        ({"strategy": "block"}, "strategy"),
        ({"group_size": -2}, "group_size"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "cache"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotations"),
        ({"targets": ["re:(a*)*b"]}, "too complex"),
        ({"config_groups": []}, "an object"),
        ({"moe_sparsity_config": {"expert_sparsity": 0.5}}, "sparse experts"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    raw = scheme(4, "group", "pack-quantized")
    group = raw["config_groups"]["group_0"]
    for key, value in changes.items():
        for place in (group["weights"], group, raw):
            if key in place:
                place[key] = value
                break
        else:
            raw[key] = value
    with pytest.raises(UserError, match=words):
        reader_of(raw)


def test_ignored_and_untargeted_modules_are_float(tmp_path: Path) -> None:
    parts = {"weight": np.zeros((N, K), np.float32)}
    for changes in ({"ignore": [PATH]}, {"ignore": ["re:.*up_proj"]}, {}):
        assert isinstance(read(tmp_path, parts, reader_of(scheme(4, "group", "pack-quantized", **changes))), Reject)
    stored_quantized = {"weight": np.zeros((N, K), np.int8), "weight_scale": np.ones((N, 1), np.float32)}
    with pytest.raises(UserError, match="leaves this module float"):
        read(tmp_path, stored_quantized, reader_of(scheme(8, "channel", "int-quantized", ignore=[PATH])))


def test_symmetric_weights_with_zero_points_are_refused(tmp_path: Path) -> None:
    zeros = np.ones((N, 1), np.int8)
    parts = {"weight": np.zeros((N, K), np.int8), "weight_scale": np.ones((N, 1), np.float32)}
    with pytest.raises(UserError, match="symmetric weight"):
        read(tmp_path, parts | {"weight_zero_point": zeros}, reader_of(scheme(8, "channel", "int-quantized")))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", plain.SCALES)
def test_plain_int8(name: str, flat: bool, tmp_path: Path) -> None:
    q = RANDOM.integers(-128, 128, (N, K), dtype=np.int8)
    scale = (RANDOM.random((N, 1)) + 0.1).astype(np.float32)
    parts = {"weight": q, name: scale[:, 0] if flat else scale}
    write_safetensors(tmp_path / "model.safetensors", {f"{PATH}.{part}": array for part, array in parts.items()})
    tensors = read_checkpoint(tmp_path)
    reader = readers.unannounced_reader(tensors)
    assert isinstance(reader, plain.PlainConfig)
    assert reader.activations == "float"
    quant = reader.read(stored.StoredLayer(PATH, (N, K), tensors))
    assert isinstance(quant, QuantTensor)
    np.testing.assert_array_equal(weight(quant), q * scale)
    assert reader_of({"quant_method": "w8a8_int8"}).activations == "int8"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "one scale"),
        ({"weight_scale": np.ones(N, np.float32), "scales": np.ones(N, np.float32)}, "one scale"),
        ({"weight_scale": np.ones((N, 3), np.float32)}, "disagrees"),
        ({"weight_scale": np.ones(N, np.float32), "zero_point": np.zeros(N, np.int8)}, "zero points"),
    ],
)
def test_plain_int8_that_is_not_plain(parts: dict[str, Array], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read(tmp_path, parts | {"weight": np.zeros((N, K), np.int8)}, plain.PlainConfig())


def test_decoding_goes_tile_by_tile(tmp_path: Path) -> None:
    rows = 60_000  # more than one tile
    q = RANDOM.integers(-128, 128, (rows, K), dtype=np.int8)
    scale = np.arange(1, rows + 1, dtype=np.float32)[:, None]
    tensors = {f"{PATH}.weight": q, f"{PATH}.weight_scale": scale}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    quant = plain.PlainConfig().read(stored.StoredLayer(PATH, (rows, K), read_checkpoint(tmp_path)))
    assert isinstance(quant, QuantTensor)
    assert len(list(quant.tiles())) > 1
    np.testing.assert_array_equal(decoded(quant).codes, (q.astype(np.int16) + 128).astype(np.uint8))
    np.testing.assert_array_equal(decoded(quant).scale, scale)


LAYERS = (
    "lm_head",
    "model.embed.proj",
    *(f"model.layers.{i}.{part}" for i in (0, 1, 10) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")),
)
NAMED = ("re:.*down_proj$", "re:model.layers.1", "re:.*mlp", "re:down_proj", "re:.*proj", "re:lm_head", "re:.*[.]0[.]")
TARGETS = st.sampled_from([*LAYERS, *NAMED, "Linear", "Module", "Embedding", "LinearBase", "mlp", "down_proj"])


@pytest.mark.slow
@given(groups=st.lists(st.lists(TARGETS, min_size=1, max_size=4), min_size=1, max_size=5), ignore=st.lists(TARGETS))
@settings(max_examples=100, deadline=None)
def test_a_layer_has_the_scheme_that_the_library_gives_it(groups: list[list[str]], ignore: list[str]) -> None:
    """Names before patterns before classes; which scheme it is shows in its group size."""
    library = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    raw = scheme(8, "group", "int-quantized", ignore=ignore)
    (group,) = raw["config_groups"].values()
    raw["config_groups"] = {
        f"group_{i}": {**group, "targets": targets, "weights": {**group["weights"], "group_size": 1 << i}}
        for i, targets in enumerate(groups)
    }
    model = torch.nn.Module()
    for path in LAYERS:
        parent = model
        *folders, name = path.split(".")
        for folder in folders:
            if not hasattr(parent, folder):
                parent.add_module(folder, torch.nn.Module())
            parent = getattr(parent, folder)
        parent.add_module(name, torch.nn.Linear(32, 1))
    library.apply_quantization_config(model, library.QuantizationConfig(**raw), show_progress=False)
    expected = [getattr(model.get_submodule(path), "quantization_scheme", None) for path in LAYERS]
    found = [reader_of(raw).scheme((path,)) for path in LAYERS]
    assert [each and each.group_size for each in found] == [each and each.weights.group_size for each in expected]


LEAF = st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["int", "group", "channel", "re:.*", "Linear"])
INNER = st.dictionaries(
    st.sampled_from(["num_bits", "type", "strategy", "symmetric", "group_size", "dynamic", "actorder"]), LEAF
)
GROUP_OF = st.dictionaries(
    st.sampled_from(["weights", "input_activations", "targets", "format"]), INNER | LEAF | st.lists(LEAF, max_size=2)
)


@given(groups=st.dictionaries(st.text(max_size=3), GROUP_OF | LEAF, max_size=2), ignore=LEAF | st.lists(LEAF))
@settings(max_examples=150, deadline=None)
def test_any_config_is_read_or_refused(groups: dict[str, Any], ignore: Any) -> None:
    with contextlib.suppress(UserError):
        compressed.parse_compressed({"format": "pack-quantized", "config_groups": groups, "ignore": ignore}, "test")
