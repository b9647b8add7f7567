"""A graph as text, in ONNX's own syntax, and a log that writes one after each pass: `--dump-passes`.

Weights are references and stay so: of a constant with more than a few elements, type and name are written.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.helper
import onnx.printer
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from instantrt.passes.core.errors import UserError
from instantrt.passes.core.rewrite import Pass, PassLog
from instantrt.passes.core.subgraphs import graphs

FIX = "name a new folder for the passes"
SHORT = 8  # elements of a constant whose values are written
BETWEEN = re.compile(r', (?=\w+(\[[^]]*\])? ["\w])')  # two declarations; behind it are a type and a name


def text_of(graph: gs.Graph) -> str:
    """`graph` as `onnx.parser` reads it. What is declared, but neither given nor made by a node, is a weight."""
    proto = OnnxExporter.export_graph(graph, do_type_check=False)
    proto.name = "graph"
    for each in graphs(proto):
        for tensor in list(each.initializer):
            if tensor.data_location == onnx.TensorProto.EXTERNAL or math.prod(tensor.dims) > SHORT:
                each.initializer.remove(tensor)
                each.value_info.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        for node in each.node:
            if node.name == node.output[0]:
                node.ClearField("name")
    head, start, body = onnx.printer.to_text(proto).partition("{\n")
    text = BETWEEN.sub(",\n    ", head) + start + body
    return "".join(f"{line.rstrip()}\n" for line in text.replace(" =  {", " = {").splitlines())


def file_name(by: type[Pass]) -> str:
    """FuseRmsNorm -> fuse_rms_norm."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", by.__name__).lower()


@dataclass
class Dump(PassLog):
    """Writes the graph to `folder` after each pass that changed it, and to `passes.txt` a line for every pass."""

    folder: Path = Path()
    lines: int = 0
    seen: int = 0  # entries of the passes before

    def __post_init__(self) -> None:
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise UserError("not a folder", where=str(self.folder), found=f"{there} is a file", fix=FIX)
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            raise UserError("not empty", where=str(self.folder), fix=FIX)

    def passed(self, by: Pass, graph: gs.Graph, *, changed: bool) -> None:
        entries, self.seen = self.entries[self.seen :], len(self.entries)
        rejected = sum(bool(e.reason) for e in entries)
        done = f"{len(entries) - rejected} rewritten" if changed else "unchanged"
        path = self.folder / self.target / f"{self.lines:02}-{file_name(type(by))}.txt"
        line = f"{path.relative_to(self.folder).with_suffix('')}: {done}" + (f", {rejected} rejected" * bool(rejected))
        self.lines += 1
        with (self.folder / "passes.txt").open("a") as file:
            print(line, file=file)
        if changed:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text_of(graph))
