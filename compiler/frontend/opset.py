"""An ONNX model of an older opset -> the same model at OPSET: node by node, and each change compared with what it was.

onnx's own converter changes what some operators mean (docs/facts.md, "Opset conversion"). So it is given one node at a
time, after the RULES, and what comes out runs on random inputs beside the node that went in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import onnx.version_converter
from onnx.helper import get_attribute_value, make_empty_tensor_value_info, make_graph, make_model, make_opsetid

from instantrt.compiler.frontend.compare import Finding, compared
from instantrt.compiler.frontend.model import OPSET
from instantrt.passes.core.errors import UserError, first_line
from instantrt.passes.core.subgraphs import within

OLDEST = 7  # of ONNX Runtime: nothing could tell whether a conversion from an older one is right
RUNS = 27  # the last at which ONNX Runtime has all that passes write
NEWEST = max(RUNS, onnx.defs.onnx_opset_version())
STANDARD = ("", "ai.onnx")

FAILURES = (  # what onnx raises over a node; of assertions, RuntimeError
    RuntimeError,
    onnx.checker.ValidationError,
    onnx.parser.ParseError,
    onnx.shape_inference.InferenceError,
    onnx.version_converter.ConvertError,
)

Types = Mapping[str, onnx.TypeProto]
Values = Mapping[str, onnx.TensorProto]


@dataclass(frozen=True)
class Old:
    """A node as a rule sees it: its attributes, the rank of its first input (None: unknown), its outputs."""

    op: str
    attributes: Mapping[str, Any]
    rank: int | None
    outputs: int

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def call(self, inputs: str, **attributes: Any) -> str:
        """`o0 = op <its attributes, and these> (inputs)`; None takes an attribute out."""
        merged = {name: value for name, value in {**self.attributes, **attributes}.items() if value is not None}
        return f"o0 = {self.op} {written(merged)} ({inputs})"


def written(attributes: Mapping[str, Any]) -> str:
    """In ONNX's text syntax."""
    forms = {name: literal(value) for name, value in attributes.items()}
    return f"<{', '.join(f'{name} = {value}' for name, value in forms.items())}>" if forms else ""


def literal(value: Any) -> str:
    if isinstance(value, bytes | str):
        return f'"{value.decode() if isinstance(value, bytes) else value}"'
    if isinstance(value, float):
        return f"{value:.9e}"  # all of a float32
    return str(value) if isinstance(value, int) else f"[{', '.join(literal(each) for each in value)}]"


def flat(old: Old) -> str:
    """Softmax and its like worked on [product of the axes before, product of `axis` and those after]."""
    axis = old.get("axis", 1)
    if old.rank is not None and axis % old.rank == old.rank - 1:
        return old.call("i0", axis=-1)
    return f"""s = Shape(i0) f = Flatten <axis = {axis}> (i0) h = {old.op} <axis = -1> (f)
        o0 = Reshape <allowzero = 1> (h, s)"""


def resized(old: Old) -> str:
    """Resize of opset 10 and Upsample had one way to find coordinates; scales are an attribute, or the second input."""
    scales = old.get("scales")
    constant = "" if scales is None else f"i1 = Constant <value_floats = {literal(scales)}> ()"
    how = {"mode": old.get("mode", "nearest"), "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return f"{constant} o0 = Resize {written(how)} (i0, , i1)"


def channels(old: Old) -> str:
    """Scale and bias had a value for each group, [G]; now they have one for each channel, [C]."""
    spread = "\n".join(
        f"u{i} = Unsqueeze({i}, last) e{i} = Expand(u{i}, form) r{i} = Reshape(e{i}, last)" for i in ("i1", "i2")
    )
    return f"""c = Shape <start = 1, end = 2> (i0) g = Constant <value_ints = [{old.get("num_groups")}]> ()
        n = Div(c, g) form = Concat <axis = 0> (g, n) last = Constant <value_ints = [-1]> ()
        {spread} {old.call("i0, ri1, ri2")}"""


def normalized(old: Old) -> str | None:
    """With spatial = 0 each element had a mean; more than one output meant training, of which no rule speaks."""
    if old.get("spatial", 1) or old.outputs > 1:
        return None
    return f"""d = Sub(i0, i3) e = Constant <value_float = {literal(old.get("epsilon", 1e-5))}> ()
        v = Add(i4, e) r = Sqrt(v) n = Div(d, r) m = Mul(n, i1) o0 = Add(m, i2)"""


def spelled(old: Old) -> str:
    """onnx's checker cannot read the operator's own formula where its axes are left to the default."""
    return old.call("i0", axes=old.get("axes", [0, 2, 3]))


def simplified(old: Old) -> str | None:
    """ONNX Runtime's optimizer writes RMSNormalization by this name, as if it were a standard operator."""
    return None if old.outputs > 1 else f"o0 = RMSNormalization {written(old.attributes)} (i0, i1)"


# Operator -> the opset at which it begins to mean what it means today, and what it was, in today's words. None leaves
# a node to onnx's converter, as does an operator that is not here.
RULES: Mapping[str, tuple[int, Callable[[Old], str | None]]] = {
    "Softmax": (13, flat),
    "LogSoftmax": (13, flat),
    "Hardmax": (13, flat),
    "Resize": (11, resized),
    "Upsample": (10, resized),
    "GroupNormalization": (21, channels),
    "BatchNormalization": (9, normalized),
    "MeanVarianceNormalization": (OPSET, spelled),
    "SimplifiedLayerNormalization": (OPSET, simplified),
}


def has_rule(node: onnx.NodeProto, version: int) -> bool:
    """Is a node of opset `version` put into other words?"""
    return node.domain in STANDARD and version < RULES.get(node.op_type, (0, None))[0]


def standard_opset(model: onnx.ModelProto, path: Path) -> int:
    """The opset of the model's standard operators, which must be one that can be read."""
    said = {o.version for o in model.opset_import if o.domain in STANDARD}
    found = said or {1}  # what is said of models from before opsets
    if len(found) > 1 or not OLDEST <= min(found) <= NEWEST:
        raise UserError(
            "the model's opset cannot be compiled" if said else "the model does not say its opset",
            where=str(path),
            expected=f"one opset of the standard operators, {OLDEST} to {NEWEST}",
            found=", ".join(map(str, sorted(said))),
            fix=f"export the model at opset {OPSET}",
        )
    return int(min(found))


def at_opset(model: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """Makes OPSET of an older model, in place, and RUNS of a newer one; what could not be compared is said in notes.

    Large weights may be without their values. UserError names the first node that came out as something else.
    """
    version = standard_opset(model, path)
    kept = [o for o in model.opset_import if o.domain not in STANDARD]
    target = min(max(version, OPSET), RUNS)
    conversion = Conversion(version, target, path)
    if version != target:
        model.graph.CopyFrom(with_types(model, path).graph)
        conversion.convert(model.graph, {}, {})
    del model.opset_import[:]
    model.opset_import.extend([make_opsetid("", target), *kept])
    return tuple(dict.fromkeys(conversion.notes))


def with_types(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model with every type and shape that follows from its inputs and weights."""
    try:
        return onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError as error:
        raise UserError("not a valid ONNX model", where=str(path), found=first_line(error)) from None


class Conversion:
    """From opset `version` to `target`; nodes that say the same of inputs of the same type are compared once."""

    def __init__(self, version: int, target: int, path: Path) -> None:
        self.version, self.target, self.path = version, target, path
        self.known: dict[bytes, tuple[onnx.ModelProto, Finding]] = {}
        self.notes: list[str] = []

    def convert(self, graph: onnx.GraphProto, types: Types, values: Values) -> None:
        """Converts a graph and those within it; `types` and `values` are those of the graphs around it."""
        described = (*graph.input, *graph.output, *graph.value_info)
        types = {**types, **{v.name: v.type for v in described if v.type.WhichOneof("value")}}
        values = {**values, **{t.name: t for t in graph.initializer}}
        read = {name for node in graph.node for name in (*node.input, *names_within(node))}
        read |= {output.name for output in graph.output}
        nodes = list(graph.node)
        del graph.node[:]
        for node in nodes:
            for inner in within(node):
                self.convert(inner, types, values)
            graph.node.extend(self.replaced(node, types, values, read) if self.changed(node) else [node])

    def changed(self, node: onnx.NodeProto) -> bool:
        """Is it another version of its operator at the target? Bodies are converted by themselves."""
        if node.domain not in STANDARD:
            return False
        if not onnx.defs.has(node.op_type) and has_rule(node, self.version):
            return True
        try:
            old, new = (onnx.defs.get_schema(node.op_type, v, "") for v in (self.version, self.target))
        except onnx.defs.SchemaError:
            raise self.error(node, "an operator that its opset does not have") from None
        if node.op_type == "Scan" and old.since_version == 8:
            raise self.error(node, "an operator that cannot be converted")
        other = old.since_version != new.since_version or (has_rule(node, self.version) and self.version < self.target)
        return other and not within(node)

    def replaced(self, node: onnx.NodeProto, types: Types, values: Values, read: set[str]) -> list[onnx.NodeProto]:
        """What `node` becomes, compared with it."""
        old = alone(node, types, values, self.version)
        used = max((i + 1 for i, name in enumerate(node.output) if name in read), default=1)
        key = old.SerializeToString(deterministic=True) + bytes([used])
        if key not in self.known:
            try:
                new = rewritten(old, self.version) or converted(old, self.target)
            except FAILURES as error:
                raise self.error(node, "an operator that cannot be converted", found=last_line(error)) from None
            self.known[key] = new, compared(old, new, used)
        new, finding = self.known[key]
        if finding.differs:
            raise self.error(node, "an operator that does not survive the conversion", found=finding.reason)
        if finding.reason and not same_form(node.op_type, self.version, self.target):
            self.notes.append(
                f"{node.op_type} of opset {self.version} could not be compared with what became of it: {finding.reason}"
            )
        return list(renamed(node, new))

    def error(self, node: onnx.NodeProto, what: str, found: str = "") -> UserError:
        return UserError(
            f"the model cannot be brought to opset {self.target}: {node.op_type} is {what}",
            where=f"{self.path}, node {node.name or ', '.join(node.output)}",
            expected=f"{node.op_type} of opset {self.version} in today's words" if found else "",
            found=found,
            fix=f"export the model at opset {OPSET}",
        )


def last_line(error: Exception) -> str:
    """The converter's assertions begin with its own file names."""
    return first_line(error).rsplit("failed: ", 1)[-1]


def names_within(node: onnx.NodeProto) -> Iterator[str]:
    """All that the graphs within a node read and give."""
    for graph in within(node):
        yield from (output.name for output in graph.output)
        for inner in graph.node:
            yield from (*inner.input, *names_within(inner))


def alone(node: onnx.NodeProto, types: Types, values: Values, version: int) -> onnx.ModelProto:
    """A model of nothing but `node`: inputs i0, i1, ..., outputs o0, o1, ...; constants whose value is here stay so."""
    single, inputs, constants = onnx.NodeProto(), [], []
    sizes: dict[str, str] = {}
    single.CopyFrom(node)
    single.name, single.domain = "", ""
    single.input[:] = [name and f"i{i}" for i, name in enumerate(node.input)]
    single.output[:] = [name and f"o{i}" for i, name in enumerate(node.output)]
    for name, here in zip(node.input, single.input, strict=True):
        tensor = values.get(name)
        if name and tensor is not None and has_value(tensor):
            constants.append(copied(tensor, here))
        elif name:
            known = types[name] if name in types else type_of(tensor) if tensor is not None else onnx.TypeProto()
            inputs.append(onnx.ValueInfoProto(name=here, type=known))
            for size in inputs[-1].type.tensor_type.shape.dim:
                if size.dim_param:  # nodes of one kind have other names for their sizes
                    size.dim_param = sizes.setdefault(size.dim_param, f"d{len(sizes)}")
    outputs = [make_empty_tensor_value_info(name) for name in single.output if name]
    graph = make_graph([single], "alone", inputs, outputs, constants)
    return make_model(graph, opset_imports=[make_opsetid("", version)], ir_version=10)


def has_value(tensor: onnx.TensorProto) -> bool:
    return 0 in tensor.dims or any(field.name.endswith("_data") for field, _ in tensor.ListFields())


def copied(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def type_of(tensor: onnx.TensorProto) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)


def converted(old: onnx.ModelProto, target: int) -> onnx.ModelProto:
    """By onnx's converter; backwards, what has kept its form is taken as it is."""
    if old.opset_import[0].version < target:
        return onnx.version_converter.convert_version(described(old), target)
    new = onnx.ModelProto()
    new.CopyFrom(old)
    new.opset_import[0].version = target
    return new


def described(model: onnx.ModelProto) -> onnx.ModelProto:
    """With the type of each output, which the converter asks for."""
    model = onnx.shape_inference.infer_shapes(model)
    for output in model.graph.output:
        if not output.type.tensor_type.elem_type:
            output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT  # read by nobody
    return model


def rewritten(old: onnx.ModelProto, version: int) -> onnx.ModelProto | None:
    """What a rule makes of the one node of `old`; None where none says anything of it."""
    (node,) = old.graph.node
    if not has_rule(node, version):
        return None
    known = next((i.type.tensor_type for i in old.graph.input if i.name == "i0"), None)
    rank = len(known.shape.dim) if known is not None and known.HasField("shape") else None
    attributes = {a.name: get_attribute_value(a) for a in node.attribute}
    _, rule = RULES[node.op_type]
    text = rule(Old(node.op_type, attributes, rank, len(node.output)))
    if text is None:
        return None
    new = onnx.ModelProto()
    new.CopyFrom(old)
    new.opset_import[0].version = OPSET
    del new.graph.node[:]
    new.graph.node.extend(onnx.parser.parse_graph(f"g () => () {{ {text} }}").node)
    return new


def renamed(node: onnx.NodeProto, new: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes that replace `node`, with the names around it; the one that makes its first output keeps its own."""
    stem = node.name or next(name for name in node.output if name)
    names = {f"i{i}": name for i, name in enumerate(node.input)} | {f"o{i}": n for i, n in enumerate(node.output)}
    added = [t for t in new.graph.initializer if t.name not in names]
    constants = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in added]
    for i, template in enumerate((*constants, *new.graph.node)):
        each = onnx.NodeProto()
        each.CopyFrom(template)
        each.name = node.name if each.output and names.get(each.output[0]) == node.output[0] else f"{stem}/{i}"
        for side in (each.input, each.output):
            side[:] = [name and names.get(name, f"{stem}/{name}") for name in side]
        yield each


def same_form(op: str, *versions: int) -> bool:
    """Have the operator's attributes, inputs and outputs stayed, so that only its types can be others?"""
    return onnx.defs.has(op) and len({form(onnx.defs.get_schema(op, v, "")) for v in versions}) == 1


def form(schema: onnx.defs.OpSchema) -> tuple[Any, ...]:
    attributes = sorted((a.name, a.default_value.SerializeToString()) for a in schema.attributes.values())
    return schema.deprecated, tuple(attributes), len(schema.inputs), len(schema.outputs)
