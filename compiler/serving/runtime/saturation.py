"""Does this CPU sum products of 8 by signed 8 bits without saturation? Some forms of a linear need it.

x86 without VNNI does not, and says nothing: the numbers are wrong (docs/facts.md, "Saturation without VNNI"). The
CPU is asked by a product of largest values, as names of features are elsewhere on every system.
"""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime as ort

NEEDED = "needs VNNI on x86"  # the description of a graph that has such a form
# y int32[1,1] = MatMulInteger(a uint8[1,64], b int8[64,1]), opset 13, as onnx serializes it
PROBE = (
    b'\x08\x08:^\n\x1a\n\x01a\n\x01b\x12\x01y"\rMatMulInteger:\x00\x12\x01pZ\x13\n\x01a\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02'
    b"\x08\x01\n\x02\x08@Z\x13\n\x01b\x12\x0e\n\x0c\x08\x03\x12\x08\n\x02\x08@\n\x02\x08\x01b\x13\n\x01y\x12\x0e\n\x0c\x08\x06"
    b"\x12\x08\n\x02\x08\x01\n\x02\x08\x01B\x04\n\x00\x10\r"
)


@functools.cache
def saturates() -> bool:
    probe = ort.InferenceSession(PROBE, providers=["CPUExecutionProvider"])
    (y,) = probe.run(None, {"a": np.full((1, 64), 255, np.uint8), "b": np.full((64, 1), 127, np.int8)})
    return int(y[0, 0]) != 64 * 255 * 127


def refuse_saturation(session: ort.InferenceSession) -> None:
    """RuntimeError where the model of `session` would give wrong numbers on this CPU."""
    if session.get_modelmeta().graph_description == NEEDED and saturates():
        raise RuntimeError(
            "this CPU has no VNNI instructions, and its 8-bit products would overflow: compile with --target x86-avx2"
        )
