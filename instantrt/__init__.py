"""InstantRT: an ahead-of-time compiler from checkpoints to deployable artifacts with quantized weights.

from instantrt import LLM, Request, compile_model
(artifact,) = compile_model(Request("model", targets="x86", out="build", quant="a16w8"))
with LLM("build") as llm:
    print(llm.generate("Once upon a time").text)

The packages lie at the top of the repository, beside this folder; the links here give them their one import name.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instantrt.compiler.compile import compile_model
    from instantrt.compiler.encoder import Classifier, Embedder
    from instantrt.compiler.llm import LLM, load_artifact
    from instantrt.compiler.request import Request

__all__ = ["LLM", "Classifier", "Embedder", "Request", "compile_model", "load_artifact"]

# ONNX Runtime's Linux wheels have telemetry switched on; the switch is read on import (docs/facts.md, "Telemetry").
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_WHERE = {
    "Classifier": "instantrt.compiler.encoder",
    "Embedder": "instantrt.compiler.encoder",
    "LLM": "instantrt.compiler.llm",
    "Request": "instantrt.compiler.request",
    "compile_model": "instantrt.compiler.compile",
    "load_artifact": "instantrt.compiler.llm",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: `import instantrt` alone stays cheap."""
    if name not in _WHERE:
        raise AttributeError(name)
    return getattr(import_module(_WHERE[name]), name)
