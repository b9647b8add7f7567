"""Layers that are alike are exported once and repeated: the same graph, node for node, and never for others."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from instantrt.compiler.frontend import export
from instantrt.compiler.frontend.alike import Layers, UnlikeError, find_layers, some_layers
from instantrt.compiler.frontend.export import export_graph, export_whole, finish, order_by_use
from instantrt.compiler.frontend.export_cache import cache_folder, recall
from instantrt.compiler.frontend.model import LlmShape
from instantrt.compiler.frontend.repeat import repeat_layers
from instantrt.compiler.frontend.skeleton import build_skeleton, llm_shape
from tests.models import DEEP

LLAMA = DEEP["llama"]


def skeleton(**fields: Any) -> tuple[Any, LlmShape]:
    model = build_skeleton({**LLAMA, **fields}, Path(), False)
    return model, llm_shape(model.config)


def exported(fields: dict[str, Any], *, whole: bool) -> tuple[list[int], list[str], str]:
    """(layers of each export, notes, the graph's digest); kept as the exports of other tests are, and as long.

    `whole`: as if no layers could be repeated.
    """

    def make() -> bytes:
        (model, shape), seen = skeleton(**fields), list[int]()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "export_whole", lambda m, s: seen.append(s.layers) or export_whole(m, s))
            if whole:
                patch.setattr(export, "find_layers", raises)
            made = export_graph(model, shape)
        graph = made.model.SerializeToString(deterministic=True)
        return json.dumps([seen, made.notes, hashlib.sha256(graph).hexdigest()]).encode()

    about = {"fields": fields, "whole": whole, "this file": Path(__file__).read_text()}
    (seen, notes, digest), _ = recall(cache_folder(), about, make, json.loads)
    return seen, notes, digest


@pytest.mark.slow
@pytest.mark.parametrize("family", DEEP)
def test_the_repeated_graph_is_the_whole_one(family: str) -> None:
    layers = DEEP[family]["num_hidden_layers"]
    *how, repeated = exported(DEEP[family], whole=False)
    assert how == [[3 if family.startswith("gemma") else 2], []]
    *how, whole = exported(DEEP[family], whole=True)
    assert how == [[layers], [f"all {layers} layers were exported, which takes longer: so it is"]]
    assert repeated == whole


def raises(*_: Any) -> Layers:
    raise UnlikeError("so it is")


def test_layers_of_two_kinds() -> None:
    """Period 3 of 8 layers: one period, and one layer more to prove it."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    model, shape = skeleton(**{**DEEP["gemma3_text"], "num_hidden_layers": 8, "layer_types": kinds[:8]})
    assert find_layers(model, shape) == Layers("model.layers", (0, 0, 2, 0, 0, 2, 0, 0))


@pytest.mark.parametrize(
    ("alike", "shown"),
    [
        ((0, 0, 0), (0, 1)),
        ((0, 1, 1, 1), (0, 1, 2)),  # a first layer of its own
        ((0, 1, 0, 1), (0, 1, 2)),
        ((0, 0, 0, 3, 0, 0, 0, 3), (0, 3, 1)),
        ((0, 0, 0, 3), (0, 3, 1)),
        ((0, 1, 1, 0, 0), (0, 1, 3)),  # the first one comes again: as the first it has another input
    ],
)
def test_as_few_as_show_every_kind(alike: tuple[int, ...], shown: tuple[int, ...]) -> None:
    assert Layers("", alike).shown == shown


@pytest.mark.parametrize("alike", [(0, 0), (0, 1, 2), (0, 0, 2), (0, 1, 1, 3)])
def test_too_many_kinds(alike: tuple[int, ...]) -> None:
    with pytest.raises(UnlikeError, match="kind"):
        _ = Layers("", alike).shown


def scaled(index: int, factor: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A change of a model: what layer `index` gives is multiplied."""

    def change(model: Any) -> None:
        layer = model.model.layers[index]
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * factor(model)

    return change


def wider(model: Any) -> None:
    mlp = model.model.layers[2].mlp
    mlp.up_proj, mlp.gate_proj = torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(64, 96, bias=False)
    mlp.down_proj = torch.nn.Linear(96, 64, bias=False)


def another_epsilon(model: Any) -> None:
    model.model.layers[3].input_layernorm.variance_epsilon = 1e-3


def buffers(model: Any) -> None:
    for index, layer in enumerate(model.model.layers):
        layer.register_buffer("scale", torch.tensor(float(index == 3)))
        scaled(index, lambda m, layer=layer: layer.scale)(model)  # type: ignore[misc]


def remembers(model: Any) -> None:
    """The last layer adds what the first one gave."""
    first, last = model.model.layers[0], model.model.layers[3]
    forward, again = first.forward, last.forward
    kept = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        kept[:] = [forward(*args, **kwargs)]
        return kept[0]

    first.forward, last.forward = keep, lambda *args, **kwargs: again(*args, **kwargs) + kept[0]


def of_another(model: Any) -> None:
    """Layers go by twos, each with the weights of the first."""
    for index in range(4):
        norm = model.model.layers[index - index % 2].input_layernorm
        scaled(index, lambda m, norm=norm: norm.weight)(model)  # type: ignore[misc]


def zeros(model: Any) -> None:
    for index, sign in enumerate((1, 1, 1, -1)):
        scaled(index, lambda m, sign=sign: sign * 0.0)(model)  # type: ignore[misc]


def long_arrays(model: Any) -> None:
    """They differ where their text is shortened."""
    for index in range(4):
        values = np.zeros(2000, np.float32)
        values[1000] = index
        scaled(index, lambda m, values=values: torch.tensor([values]).sum())(model)  # type: ignore[misc]


def by_depth(model: Any) -> None:
    norm = model.model.norm
    forward = norm.forward
    norm.forward = lambda x: forward(x) * len(model.model.layers)


def between(model: Any) -> None:
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))


LAST = (0, 0, 0, 3)
CHANGES: dict[str, tuple[Callable[[Any], None], str | tuple[int, ...]]] = {
    "a number": (scaled(3, lambda model: 0.5), LAST),
    "a number made a tensor": (scaled(3, lambda model: torch.tensor(0.5)), LAST),
    "a number by position": (lambda model: [scaled(i, lambda m, i=i: 1 / (i + 1))(model) for i in range(4)], "kind"),  # type: ignore[misc]
    "a setting": (another_epsilon, LAST),
    "a width": (wider, (0, 0, 2, 0)),
    "a buffer": (buffers, LAST),
    "an earlier layer": (remembers, "depends on their number"),
    "another's weights": (of_another, "layer 1 reads a weight of layer 0"),
    "a zero's sign": (zeros, LAST),
    "long arrays": (long_arrays, "an array of its code"),
    "the number of layers": (by_depth, "depends on their number"),
    "another input": (between, "between two layers"),
    "values": (scaled(2, lambda model: model.lm_head.weight.sum().item()), "a run without storage"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_models_whose_layers_differ(change: str) -> None:
    model, shape = skeleton()
    assert find_layers(model, shape).alike == (0, 0, 0, 0)
    apply, found = CHANGES[change]
    apply(model)
    if isinstance(found, tuple):
        assert find_layers(model, shape).alike == found
        return
    with pytest.raises(UnlikeError, match=found):
        find_layers(model, shape)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_model_of_a_few_layers_is_whole_again(family: str) -> None:
    """Layers have their places among the few, and those that they had."""
    model, _ = skeleton(**DEEP[family])

    def numbers() -> list[Any]:
        return [model.config.to_dict(), [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")]]

    before, layers = numbers(), list(model.model.layers)
    with some_layers(model, "model.layers", (0, 2, 1)):
        assert list(model.model.layers) == [layers[0], layers[2], layers[1]]
        assert numbers()[1] == sorted(numbers()[1])
        assert numbers()[0].get("layer_types") == (
            before[0].get("layer_types") and [before[0]["layer_types"][i] for i in (0, 2, 1, 3)]
        )
    assert (numbers(), list(model.model.layers)) == (before, layers)


def keeps_a_table(model: Any) -> None:
    """As rotary modules do that make their tables when they are first run."""
    norm = model.model.norm
    norm.register_buffer("table", torch.ones(64), persistent=False)
    norm.made, norm.more, forward = False, {}, norm.forward

    def run(x: Any) -> Any:
        if not norm.made:
            norm.made, norm.table, norm.more["table"] = True, torch.arange(64) * 0.01, torch.arange(64) * 0.02
            norm.another = norm.table * 3
        return forward(x) * norm.table * norm.more["table"] * norm.another

    norm.forward = run


def test_a_recording_leaves_nothing_in_the_model() -> None:
    """The export that comes next would take what was made without values, or nothing, for tables."""
    model, shape = skeleton()
    keeps_a_table(model)
    before = [dict(module.__dict__) for module in model.modules()]
    assert find_layers(model, shape).alike == (0, 0, 0, 0)
    norm = model.model.norm
    assert (norm.made, norm.more, norm.table.sum().item()) == (False, {}, 64.0)
    assert [module.__dict__.keys() for module in model.modules()] == [each.keys() for each in before]
    assert not any(module._forward_hooks for module in model.modules())


def test_nodes_stand_in_the_order_of_their_use() -> None:
    """However they were traced: some models go through a set of words, which each process orders in its own way."""
    cosine, sine = "c = Cos(x)", "s = Sin(x)"
    for traced in ((cosine, sine), (sine, cosine)):
        body = "\n".join((*traced, "b = If (t) <then_branch = p () => (float[N] y) { y = Identity(s) },"))
        graph = ir.from_onnx_text(
            f"<ir_version: 10, opset_import: ['': 20]> g (float[N] x, bool t) => (float[N] z) {{ {body}"
            " else_branch = q () => (float[N] w) { w = Identity(x) }> z = Mul(b, c) }".replace("'", '"')
        ).graph
        order_by_use(graph)
        assert [node.op_type for node in graph] == ["Sin", "If", "Cos", "Mul"]


@pytest.mark.slow
def test_a_table_outside_of_the_model_is_made_again() -> None:
    """What code keeps where nobody can look is none of a recording: its tensors have no values."""
    model, shape = skeleton(num_hidden_layers=3)
    norm = model.model.norm
    forward, table = norm.forward, cache(lambda: torch.arange(64) * 0.01)
    norm.forward = lambda x: forward(x) * table()
    assert "nothing recorded makes" in str(export_graph(model, shape).notes)


@pytest.mark.slow
def test_what_was_exported_unlike_is_not_repeated() -> None:
    """Whatever says that layers are alike, their nodes have the last word."""
    model, shape = skeleton()
    layers = find_layers(model, shape)
    with some_layers(model, layers.path, layers.shown):
        traced = export_whole(model, shape.with_layers(2))
    node = next(n for n in traced.graph if n.op_type == "Attention" and ".1." in (n.name or ""))
    was = node.attributes["scale"]
    node.attributes["scale"] = ir.AttrFloat32("scale", math.pi)
    with pytest.raises(UnlikeError, match="not exported alike"):
        repeat_layers(traced.graph, layers, shape)
    node.attributes["scale"] = was
    key = node.inputs[1]
    node.replace_input_with(1, node.inputs[2])
    with pytest.raises(UnlikeError, match="not exported alike"):
        repeat_layers(traced.graph, layers, shape)
    node.replace_input_with(1, key)
    repeat_layers(traced.graph, layers, shape)
    finish(traced, shape)
    assert [value.name for value in traced.graph.outputs] == shape.output_names()
