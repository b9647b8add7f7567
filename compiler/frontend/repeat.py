"""A graph of some of a model's layers -> the graph of all: what is exported once is repeated, after it is compared.

Each node is named by its module's path, by which a layer's nodes are found; `Layers` says which layers are alike. Those
of them that are exported must be so node for node: operators, attributes, shapes and inputs, where a layer's own
weights, keys and values are called by its number and everything else is one and the same.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass

import onnx_ir as ir

from instantrt.compiler.frontend.alike import Layers, UnlikeError
from instantrt.compiler.frontend.model import Interface

Place = tuple[int, int]  # of a value in its layer: which node makes it, as which output


@dataclass(frozen=True)
class Names:
    """What belongs to a layer has its number in its name: weights and buffers, nodes, keys and values."""

    pattern: re.Pattern[str]

    @classmethod
    def of(cls, layers: Layers) -> Names:
        return cls(re.compile(rf"^((?:model\.)?{re.escape(layers.path)}\.|past_key_values\.|present\.)(\d+)(?=\.|$)"))

    def layer(self, name: str | None) -> int | None:
        found = self.pattern.match(name or "")
        return int(found[2]) if found else None

    def of_layer(self, name: str | None, index: int | str) -> str:
        return self.pattern.sub(rf"\g<1>{index}", name or "")


@dataclass(frozen=True, eq=False)
class ExportedLayer:
    """A layer in the graph: its nodes in their order, and where each of its values is made."""

    index: int
    nodes: list[ir.Node]
    places: dict[ir.Value, Place]
    before: ExportedLayer | None
    names: Names

    @property
    def takes(self) -> ir.Value | None:
        """The one value of the layer before that it reads; of the first layer that is not known."""
        if self.before is None:
            return None
        read = {v for node in self.nodes for v in node.inputs if v is not None and v in self.before.places}
        if len(read) != 1:
            raise UnlikeError(f"layer {self.index} takes {len(read)} tensors from the layer before")
        return read.pop()

    def value(self, place: Place) -> ir.Value:
        node, output = place
        return self.nodes[node].outputs[output]

    def address(self, value: ir.Value | None) -> Hashable:
        """What a value is to this layer, the same for every layer that is alike."""
        if value is not None and value in self.places:
            return self.places[value]
        if value is None or (value.const_value is None and self.names.layer(value.name) != self.index):
            return id(value)  # an exporter's values have an == of their own, which makes nodes
        own = self.names.of_layer(value.name, "*") if self.names.layer(value.name) == self.index else ""
        return own, repr(value.shape), value.dtype, value.const_value and value.const_value.tobytes()


def repeat_layers(graph: ir.Graph, layers: Layers, shape: Interface) -> None:
    """Makes the graph of `layers.shown` layers one of all, `shape.layers`; UnlikeError, and no change, if it cannot."""
    names, kinds = Names.of(layers), [layers.alike[index] for index in layers.shown]
    exported = exported_layers(graph, names, len(kinds))
    for layer, kind in zip(exported, kinds, strict=True):
        if (first := exported[kinds.index(kind)]) is not layer:
            compare(first, layer)
    takes = [layer.takes for layer in exported]
    places = [layer.places[taken] for layer, taken in zip(exported, takes[1:], strict=False) if taken is not None]
    places.append(places[kinds.index(kinds[-1])])  # what the last gives is read outside, so its twin tells which it is
    given = [layer.value(place) for layer, place in zip(exported, places, strict=True)]
    check_uses(exported, given)
    latest = {kind: exported[index] for index, kind in enumerate(kinds)}
    hidden, end = given[0], exported[-1].nodes[-1]
    readers = tuple(given[-1].uses())
    known = (*graph.inputs, *graph.initializers.values(), *graph.outputs)
    named = {value.name: value for value in known if names.layer(value.name) in (None, 0)}
    for index in range(1, shape.layers):
        template = latest[layers.alike[index]]
        copies = {takes[template.index]: hidden}
        nodes = [copy_node(node, template, index, copies, named) for node in template.nodes]
        graph.insert_after(end, nodes)
        hidden, end = copies[given[template.index]], nodes[-1]
    for reader in readers:
        reader.node.replace_input_with(reader.idx, hidden)
    graph.inputs[:] = [value for value in named.values() if value.producer() is None and value.const_value is None]
    graph.outputs[:] = [named[name] for name in shape.output_names()]
    graph.remove([node for layer in exported[1:] for node in layer.nodes], safe=True)
    graph.initializers.clear()
    for value in named.values():
        if value.const_value is not None:
            graph.initializers.add(value)


def exported_layers(graph: ir.Graph, names: Names, count: int) -> list[ExportedLayer]:
    nodes: list[list[ir.Node]] = [[] for _ in range(count)]
    for node in graph:
        index = names.layer(node.name)
        if index is not None:
            nodes[index].append(node)
    layers: list[ExportedLayer] = []
    for index, own in enumerate(nodes):
        places = {value: (i, j) for i, node in enumerate(own) for j, value in enumerate(node.outputs)}
        layers.append(ExportedLayer(index, own, places, layers[-1] if layers else None, names))
    return layers


def compare(first: ExportedLayer, twin: ExportedLayer) -> None:
    """UnlikeError unless both are the same: all values by their addresses, and one of each is what goes in."""
    forms = [[form(node) for node in layer.nodes] for layer in (first, twin)]
    entering, taken = set[ir.Value | None](), twin.takes
    different = forms[0] != forms[1]
    for a, b in zip(first.nodes, twin.nodes, strict=False):
        for x, y in zip(a.inputs, b.inputs, strict=False):
            if y is not None and y is taken:
                entering.add(x)
            else:
                different |= first.address(x) != twin.address(y)
    if different or len(entering) != 1 or first.takes not in (None, *entering):
        raise UnlikeError(f"layers {first.index} and {twin.index} do the same, and are not exported alike")


def form(node: ir.Node) -> Hashable:
    """A node without its values: what it is, and what it makes."""
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        raise UnlikeError("a layer has branches or loops")
    attributes = tuple(sorted((name, str(a.type), repr(a.value)) for name, a in node.attributes.items()))
    made = tuple((repr(value.shape), value.dtype) for value in node.outputs)
    return node.op_identifier(), attributes, len(node.inputs), made


def check_uses(exported: list[ExportedLayer], given: list[ir.Value]) -> None:
    """UnlikeError where a layer's values are read outside of it, but for the one that it gives to what comes next."""
    owner = {node: layer.index for layer in exported for node in layer.nodes}
    for layer, gives in zip(exported, given, strict=True):
        for value in layer.places:
            reader = layer.index + 1 if value is gives and layer is not exported[-1] else None
            readers = {owner.get(use.node) for use in value.uses()} - {layer.index}
            own = layer.names.layer(value.name) == layer.index or (value is gives and layer is exported[-1])
            if readers - {reader} or (value.is_graph_output() and not own):
                raise UnlikeError(f"a value of layer {layer.index} is read outside of it")


def copy_node(
    node: ir.Node,
    template: ExportedLayer,
    index: int,
    copies: dict[ir.Value | None, ir.Value],
    named: dict[str | None, ir.Value],
) -> ir.Node:
    """The node in the layer `index`; `copies` gets what it makes, `named` the weights that it is the first to read."""
    names = template.names

    def copied(value: ir.Value, new: str | None) -> ir.Value:
        return ir.Value(name=new, shape=value.shape, type=value.type, const_value=value.const_value)

    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        if value is not None and value not in copies and names.layer(value.name) == template.index:
            new = names.of_layer(value.name, index)
            copies[value] = named[new] if new in named else named.setdefault(new, copied(value, new))
        inputs.append(copies.get(value, value))
    outputs = []
    for value in node.outputs:
        copies[value] = copied(value, names.of_layer(value.name, index) if value.is_graph_output() else None)
        outputs.append(copies[value])
        if value.is_graph_output():
            named[copies[value].name] = copies[value]
    return ir.Node(
        node.domain,
        node.op_type,
        inputs,
        node.attributes.values(),
        outputs=outputs,
        version=node.version,
        name=names.of_layer(node.name, index),
    )
