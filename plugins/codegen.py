"""`python -m instantrt.plugins.codegen` writes runtime/schema.h from the op definitions: no drift."""

from __future__ import annotations

from pathlib import Path

from instantrt.plugins.ops import DOMAIN, OPS
from instantrt.plugins.schema import Attr, Op

HEADER = Path(__file__).parent / "runtime" / "schema.h"
MOST_CHOICES = max(len(a.allowed or ()) for op in OPS for a in op.attrs)


def render() -> str:
    parts = [
        "// Written by plugins/codegen.py from the op definitions; do not edit.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        "namespace schema {",
        "",
        "struct Field {",
        "    char const* name;",
        "    int32_t value;  // the default",
        "    int32_t choices;  // 0: any value, checked against the shapes",
        f"    int32_t allowed[{MOST_CHOICES}];",
        "};",
        "",
        f'constexpr char kDomain[] = "{DOMAIN}";',
        *(line for op in OPS for line in ("", *_struct(op))),
        "",
        "}  // namespace schema",
    ]
    return "\n".join(parts) + "\n"


def _field(attr: Attr) -> str:
    allowed = attr.allowed or ()
    return f'{{"{attr.name}", {attr.default}, {len(allowed)}, {{{", ".join(map(str, allowed))}}}}}'


def _constant(name: str) -> str:
    return "k" + "".join(word.capitalize() for word in name.split("_"))


def _struct(op: Op) -> list[str]:
    ports = (*op.inputs, *op.outputs)
    names, quoted = [_constant(p.name) for p in ports], ", ".join(f'"{p.name}"' for p in ports)
    rows = [", ".join(f"DataType::{d.tensorrt_name}" for d in row) for row in op.types]
    return [
        f"// {op.name}({', '.join(p.name + '[' + ', '.join(p.shape) + ']' for p in op.inputs)})"
        f" -> {', '.join(p.name + '[' + ', '.join(p.shape) + ']' for p in op.outputs)}",
        f"struct {op.name} {{",
        f'    static constexpr char kName[] = "{op.name}";',
        f'    static constexpr char kVersion[] = "{op.version}";',
        f"    enum Port : int32_t {{ {', '.join(names)} }};",
        f"    static constexpr char const* kPortNames[] = {{{quoted}}};",
        f"    static constexpr int32_t kInputs = {len(op.inputs)};",
        f"    static constexpr int32_t kRequiredInputs = {sum(not p.optional for p in op.inputs)};",
        "    enum Attr : int32_t { " + ", ".join(_constant(a.name) for a in op.attrs) + " };",
        f"    static constexpr Field kFields[{len(op.attrs)}] = {{",
        *(f"        {_field(a)}," for a in op.attrs),
        "    };",
        "    // legal types: one row, one type for each port",
        "    template <typename DataType>",
        f"    static constexpr DataType kTypes[{len(rows)}][{len(ports)}] = {{",
        *(f"        {{{row}}}," for row in rows),
        "    };",
        "};",
    ]


if __name__ == "__main__":
    HEADER.write_text(render(), encoding="utf-8")
