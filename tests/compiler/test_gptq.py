"""GPTQ's corners: zeros that borrow, activation order, overrides per module, ragged packs, and files that lie."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.quant import gptq, readers, stored
from instantrt.compiler.quant.config import QuantConfig
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array, FileTensor, InMemory, whole
from instantrt.passes.core.linear import Linear
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Reject
from instantrt.tools.bench.synthetic import write_safetensors
from tests.checkpoints import HERE, Q_PROJ, SHAPES, decoded, gptq_tensors, read_layer, weight

PATH = "model.layers.0.mlp.down_proj"
RANDOM = np.random.default_rng(11)


def layer_tensors(
    codes: Array, zero: Array, scale: Array, bits: int, g_idx: Array | None = None, *, v2: bool = False
) -> dict[str, Array]:
    return gptq_tensors(PATH, codes, zero, scale, bits, g_idx, v2=v2)


def random_layer(k: int, n: int, group: int, bits: int) -> tuple[Array, Array, Array]:
    codes = RANDOM.integers(0, 2**bits, (k, n))
    zero = RANDOM.integers(0, 2**bits, (k // group, n))
    return codes, zero, (RANDOM.random((k // group, n)) + 0.1).astype(np.float16)


def config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False, **changes}


def read(folder: Path, tensors: dict[str, Array], shape: tuple[int, int], raw: dict[str, Any]) -> QuantTensor | Reject:
    write_safetensors(folder / "model.safetensors", tensors)
    reader = readers.announced_reader(folder, {"quantization_config": raw})
    assert reader is not None
    return reader.read(stored.StoredLayer(PATH, shape, read_checkpoint(folder)))


def expected(codes: Array, zero: Array, scale: Array, g_idx: Array) -> Array:
    """W [N, K], element by element from the definition."""
    return ((codes - zero[g_idx]) * scale[g_idx].astype(np.float64)).T.astype(np.float32)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "n"), [(32, 16), (48, 13), (32, 9)])
def test_zeros_of_zero_borrow_from_their_neighbours(k: int, n: int, bits: int, v2: bool, tmp_path: Path) -> None:
    codes, zero, scale = random_layer(k, n, 16, bits)
    zero[:, ::3] = 0
    zero[:, 1::5] = 2**bits - 1
    raw = config(bits=bits, checkpoint_format="gptq_v2" if v2 else "gptq")
    quant = read(tmp_path, layer_tensors(codes, zero, scale, bits, v2=v2), (n, k), raw)
    assert isinstance(quant, QuantTensor)
    np.testing.assert_array_equal(decoded(quant).zero, zero.T)
    np.testing.assert_array_equal(weight(quant), expected(codes, zero, scale, np.arange(k) // 16))


def test_inputs_that_fill_no_whole_word(tmp_path: Path) -> None:
    codes, zero, scale = random_layer(20, 6, 20, 4)
    quant = read(tmp_path, layer_tensors(codes, zero, scale, 4), (6, 20), config(group_size=-1))
    assert isinstance(quant, QuantTensor)
    np.testing.assert_array_equal(decoded(quant).codes, codes.T)
    np.testing.assert_array_equal(decoded(quant).zero, zero.T)


@pytest.mark.parametrize("kind", ["random", "groups swapped", "trivial"])
def test_activation_order(kind: str, tmp_path: Path) -> None:
    k, n = 64, 8
    codes, zero, scale = random_layer(k, n, 16, 4)
    g_idx = np.arange(k) // 16
    if kind == "random":
        g_idx = RANDOM.permutation(g_idx)
    elif kind == "groups swapped":  # static groups under another number: no input moves
        g_idx = np.array([2, 0, 3, 1])[g_idx]
    quant = read(tmp_path, layer_tensors(codes, zero, scale, 4, g_idx), (n, k), config(desc_act=True))
    assert isinstance(quant, QuantTensor)
    assert (quant.order is not None) == (kind == "random")
    np.testing.assert_array_equal(weight(quant), expected(codes, zero, scale, g_idx))


def traps() -> dict[str, tuple[dict[str, Any], dict[str, Any], str]]:
    """name -> (changes of the config, changes of the tensors, words of the error)."""
    k = 64
    order = np.random.default_rng(1).permutation(np.arange(k) // 16).astype(np.int32)
    return {
        "order without desc_act": ({}, {"g_idx": order}, "another order than the config says"),
        "groups of other sizes": ({"desc_act": True}, {"g_idx": np.minimum(order, 2)}, "equal groups"),
        "a negative group": ({"desc_act": True}, {"g_idx": order - 1}, "equal groups"),
        "g_idx too short": ({"desc_act": True}, {"g_idx": order[:32]}, "g_idx disagrees"),
        "no g_idx": ({"desc_act": True}, {"g_idx": None}, "has no g_idx"),
        "three bits": ({"bits": 3}, {}, "GPTQ bits"),
        "two bits": ({"bits": 2}, {}, "no kernels"),
        "bits of another type": ({"bits": "4"}, {}, "GPTQ bits"),
        "true is no number": ({"group_size": True}, {}, "group_size"),
        "a group that does not divide": ({"group_size": 48}, {}, "does not divide"),
        "eight bits announced": ({"bits": 8}, {}, "qweight disagrees"),
        "other groups announced": ({"group_size": 32}, {}, "disagrees"),
        "another layout": ({"checkpoint_format": "marlin"}, {}, "checkpoint_format"),
        "two names of the layout, and two layouts": ({"format": "gptq_v2", "checkpoint_format": "gptq"}, {}, "differ"),
        "inputs that are rotated": ({"rotation": "hadamard"}, {}, "rotates inputs as the model runs"),
        "an adapter": ({"adapter": {"name": "lora", "rank": 4}}, {}, "adds a LoRA adapter"),
        "sym as a number": ({"sym": 1}, {}, "true or false"),
        "symmetric announced": ({"sym": True}, {}, "differ from the centre"),
        "a scale of zero": ({}, {"scales": np.zeros((4, 8), np.float16)}, "positive finite"),
        "a scale that is no number": ({}, {"scales": np.full((4, 8), np.nan, np.float16)}, "positive finite"),
        "no zeros": ({}, {"qzeros": None}, "has no qzeros"),
        "packed in 16 bits": ({"pack_dtype": "int16"}, {}, "pack_dtype"),
        "a pattern that never ends": ({"dynamic": {"(a+)+b": {"bits": 8}}}, {}, "too complex"),
        "a pattern that is none": ({"dynamic": {"[": {"bits": 8}}}, {}, "regular expression"),
        "three bits in a rule": ({"dynamic": {"+:x": {"bits": 3}}}, {}, "GPTQ bits"),
        "float by a rule, stored quantized": ({"dynamic": {"-:.*down": {}}}, {}, "leaves this module float"),
    }


@pytest.mark.parametrize("name", traps())
def test_what_cannot_be_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, replaced, words = traps()[name]
    codes, zero, scale = random_layer(64, 8, 16, 4)
    zero[0, 0] = 3
    tensors = layer_tensors(codes, zero, scale, 4)
    tensors |= {f"{PATH}.{part}": array for part, array in replaced.items()}
    tensors = {part: array for part, array in tensors.items() if array is not None}
    with pytest.raises(UserError, match=words):
        decoded(read(tmp_path, tensors, (8, 64), config(**changes)))  # type: ignore[arg-type]


def test_rules_for_single_modules() -> None:
    rules = {"-:.*lm_head": {}, "+:.*layers\\.1\\.": {"bits": 8, "group_size": -1}, ".*down": {"sym": True}}
    base = gptq.parse_gptq(config(dynamic=rules), "test")
    assert base.module(["lm_head"]) is None
    changed = base.module(["model.layers.1.mlp.down_proj"])
    assert changed is not None
    assert (changed.bits, changed.group_size, changed.symmetric) == (8, -1, False)  # the first match alone counts
    down = base.module([PATH])
    assert down is not None
    assert (down.bits, down.symmetric) == (4, True)
    assert base.module(["model.layers.0.mlp.up_proj"]) == base
    assert base.module(["model.layers.10.mlp.up_proj"]) == base
    assert base.module(["x", "lm_head"]) is None  # as its tensors are called in the file
    with pytest.raises(UserError, match=r"overrides that are not read(.|\n)*adapter"):
        gptq.parse_gptq(config(dynamic={".*down": {"adapter": {"rank": 8}}}), "test")


def linear_of(path: str, n: int, k: int) -> Linear:
    return Linear(None, None, InMemory(np.zeros((n, k))), (n, k), path)


def decide(tmp_path: Path, tensors: dict[str, Array], raw: dict[str, Any], **fields: Any) -> dict[str, Any]:
    write_safetensors(tmp_path / "model.safetensors", tensors)
    found = read_checkpoint(tmp_path)
    reader = gptq.parse_gptq(raw, "test")
    asked = QuantConfig("gptq", "int8" if reader.bits == 8 else "uint4", **fields)
    linears = [linear_of(PATH, 8, 64), linear_of("lm_head", 8, 64)]
    return dict(stored.decide(linears, found, reader, asked))


def quantized_layer(**changes: Array) -> dict[str, Array]:
    return layer_tensors(*random_layer(64, 8, 16, 4), 4) | changes


def test_modules_left_float_and_a_quantized_head(tmp_path: Path) -> None:
    decisions = decide(tmp_path, quantized_layer(), config())
    assert isinstance(decisions["lm_head"], Reject)
    head = {name.replace(PATH, "lm_head"): array for name, array in quantized_layer().items()}
    decisions = decide(tmp_path, quantized_layer() | head, config())
    assert isinstance(decisions["lm_head"], QuantTensor)


def test_a_quantized_module_that_the_graph_has_not(tmp_path: Path) -> None:
    strange = {"model.layers.0.experts.0.qweight": np.zeros((8, 8), np.int32)}
    with pytest.raises(UserError, match="no linear layer"):
        decide(tmp_path, quantized_layer() | strange, config())


def test_an_ignored_layer_is_stored_only_quantized(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only quantized"):
        decide(tmp_path, quantized_layer(), config(), ignore=("*.down_proj",))


def test_both_places_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text(json.dumps(config(bits=8)))
    reader = readers.announced_reader(tmp_path, {})
    assert reader is not None
    assert (reader.method, reader.bits) == ("gptq", 8)
    with pytest.raises(UserError, match="bits differs between two configs"):
        readers.announced_reader(tmp_path, {"quantization_config": config(bits=4)})
    (tmp_path / "quantize_config.json").write_text(json.dumps(config(checkpoint_format="gptq_v2", dynamic={"-:a": {}})))
    reader = readers.announced_reader(tmp_path, {"quantization_config": config(dynamic=None)})
    assert isinstance(reader, gptq.GptqConfig)
    assert (reader.zero_offset, len(reader.dynamic)) == (0, 1)  # what one alone says


def test_shards(tmp_path: Path) -> None:
    name = "gptq-int4-g128-desc_act"
    tensors = {n: whole(t) for n, t in read_checkpoint(HERE / name).items()}
    halves = [{n: a for i, (n, a) in enumerate(sorted(tensors.items())) if i % 2 == half} for half in (0, 1)]
    for i, half in enumerate(halves):
        write_safetensors(tmp_path / f"part{i}.safetensors", half)
    index = {n: f"part{i}.safetensors" for i, half in enumerate(halves) for n in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_bytes((HERE / name / "config.json").read_bytes())
    sharded, single = (read_layer(folder, Q_PROJ, SHAPES[Q_PROJ]) for folder in (tmp_path, HERE / name))
    np.testing.assert_array_equal(weight(sharded), weight(single))


def test_other_methods_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bitsandbytes"):
        readers.announced_reader(tmp_path, {"quantization_config": {"quant_method": "bitsandbytes"}})


LAYERS = st.tuples(st.sampled_from((4, 8)), st.integers(1, 4), st.sampled_from((8, 16, 24)), st.integers(1, 20))


@given(shape=LAYERS, seed=st.integers(0, 2**32 - 1), reordered=st.booleans(), v2=st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_layer_decodes_to_its_definition(
    shape: tuple[int, int, int, int], seed: int, reordered: bool, v2: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bits, groups, group, n = shape
    random, k = np.random.default_rng(seed), groups * group
    codes, zero = random.integers(0, 2**bits, (k, n)), random.integers(0, 2**bits, (groups, n))
    scale = (random.random((groups, n)) + 0.01).astype(np.float16)
    g_idx = random.permutation(np.arange(k) // group) if reordered else np.arange(k) // group
    raw = config(bits=bits, group_size=group, desc_act=reordered, checkpoint_format="gptq_v2" if v2 else "gptq")
    tensors = layer_tensors(codes, zero, scale, bits, g_idx, v2=v2)
    quant = read(tmp_path_factory.mktemp("layer"), tensors, (n, k), raw)
    assert isinstance(quant, QuantTensor)
    np.testing.assert_array_equal(weight(quant), expected(codes, zero, scale, g_idx))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    *("bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "dynamic", "pack_dtype", "version"),
    *("zero_point", "config_groups", "ignore", "kv_cache_scheme", "sparsity_config", "transform_config"),
)


@given(method=st.sampled_from(sorted(readers.READERS)), raw=st.dictionaries(st.sampled_from(KEYS), JSON))
@settings(max_examples=200, deadline=None)
def test_any_config_is_read_or_refused(method: str, raw: dict[str, Any]) -> None:
    base = config(bits=4, version="gemm") | raw | {"quant_method": method}
    with contextlib.suppress(UserError):
        readers.announced_reader(Path("nowhere"), {"quantization_config": base})


DTYPES = st.sampled_from([np.int32, np.float16, np.int8, np.float32, ml_dtypes.bfloat16, np.int64])


@given(
    part=st.sampled_from(("qweight", "qzeros", "scales", "g_idx")),
    shape=st.lists(st.integers(0, 70), max_size=3),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_any_tensor_in_the_place_of_another_is_read_or_refused(
    part: str, shape: list[int], dtype: Any, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    tensors = quantized_layer(g_idx=np.arange(64, dtype=np.int32) // 16)
    tensors[f"{PATH}.{part}"] = noise.view(dtype).reshape(shape)
    error = None
    try:
        decoded(read(tmp_path_factory.mktemp("noise"), tensors, (8, 64), config(desc_act=True)))  # type: ignore[arg-type]
    except UserError as refusal:
        error = str(refusal)
    assert error is None or part in error


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    quant = read(tmp_path, quantized_layer(), (8, 64), config())
    assert isinstance(quant, QuantTensor)
    rows = quant.source
    assert isinstance(rows, gptq.GptqRows)
    cut: FileTensor = replace(rows.qweight, offset=rows.qweight.offset + 10_000)
    with pytest.raises(UserError, match="ends inside"):
        decoded(replace(quant, source=replace(rows, qweight=cut)))
