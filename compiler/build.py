"""compile_model(request): the road from a checkpoint to artifacts."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from compiler import pipeline
from compiler.artifact import Artifact, TensorSpec, sha256, write_manifest
from compiler.backend.writer import Progress, place, write_model
from compiler.frontend import load
from compiler.frontend.model import FloatModel
from compiler.quant import gptq, instant
from compiler.quant.config import QuantConfig
from compiler.quant.resolve import resolve
from compiler.request import Request
from compiler.support import check_supported
from compiler.target import Backend, Target
from passes.errors import UserError
from passes.insert_qdq import Decisions
from passes.quant import QuantTensor
from passes.rewrite import Ledger

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What will be written, decided before a byte is: a lowered graph for each target, and the ledger."""

    model: FloatModel
    decisions: Decisions
    lowered: dict[str, gs.Graph]
    ledger: Ledger

    def size(self, target: str) -> int:
        """Bytes of the artifact's weights."""
        return place(self.lowered[target])[1]


def plan(request: Request, say: Say = lambda text: None) -> Plan:
    """Everything but the writing: exports, decides, inserts Q/DQ, lowers."""
    say(f"reading {request.model}")
    model = load(request.model, trust_remote_code=request.trust_remote_code)
    config, params = resolve(request, model.folder, model.config)
    check_supported(request.resolved_targets(), config)
    ledger = Ledger()
    graph = pipeline.normalize(model.graph, ledger)
    say("deciding how to quantize")
    decisions = decide(graph, model, config, params, request)
    canonical = pipeline.quantize(graph, decisions, ledger)
    lowered = {
        target.name: pipeline.lower_onnxruntime(canonical.copy(), target, request, ledger)
        for target in request.resolved_targets()
    }
    return Plan(model, decisions, lowered, ledger)


def decide(
    graph: gs.Graph, model: FloatModel, config: QuantConfig | None, params: gptq.GptqConfig | None, request: Request
) -> Decisions:
    """How each linear is quantized, or why it is not."""
    found = pipeline.linears(graph)
    if config is None:
        return {}
    for pattern in config.ignore:
        if not any(QuantConfig(ignore=(pattern,)).ignored(each.path) for each in found):
            raise UserError("an ignore pattern matches no layer", found=repr(pattern), expected=found[0].path + ", say")
    head = next((f.path for f in found if model.llm is not None and f.shape[0] == model.llm.vocab), None)
    if params is not None:
        return gptq.decide(found, model.tensors, params, config, head)
    return instant.decide(found, config, np.dtype(np.float32), head, request.lm_head)


def compile_model(request: Request, say: Say = lambda text: None, progress: Progress = lambda name, size: None) -> Plan:
    """Compiles and writes `request.out`: `<target>/model.onnx` with its data and tokenizer files, and manifest.json."""
    planned = plan(request, say)
    compile_planned(request, planned, progress)
    return planned


def compile_planned(request: Request, planned: Plan, progress: Progress) -> list[Artifact]:
    """Writes what was planned; a target's folder appears when it is complete, the manifest last."""
    request.out.mkdir(parents=True, exist_ok=True)
    artifacts = [write_target(request, planned, target, progress) for target in request.resolved_targets()]
    write_manifest(request.out, artifacts, {"model": request.model.name, "request": summary(request)})
    return artifacts


def write_target(request: Request, planned: Plan, target: Target, progress: Progress) -> Artifact:
    assert target.backend is Backend.ONNXRUNTIME
    graph = planned.lowered[target.name]
    with replaced_folder(request.out / target.name) as folder:
        write_model(graph, folder / "model.onnx", progress)
        for name in SIDE_FILES:
            if (planned.model.folder / name).is_file():
                shutil.copyfile(planned.model.folder / name, folder / name)
        digests = {f"{target.name}/{p.name}": sha256(p) for p in sorted(folder.iterdir())}
    return Artifact(
        target=target.name,
        kind="onnx",
        path=f"{target.name}/model.onnx",
        inputs=specs(graph.inputs),
        outputs=specs(graph.outputs),
        quant={path: str(q) for path, q in planned.decisions.items() if isinstance(q, QuantTensor)},
        llm=asdict(planned.model.llm) if planned.model.llm else None,
        limits={"cache": cache_kind(graph)} if planned.model.llm else {},
        digests=digests,
    )


@contextmanager
def replaced_folder(final: Path) -> Iterator[Path]:
    """A folder written beside `final` that takes its place when complete, and vanishes when anything fails."""
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if final.exists():
            old = partial.with_name(partial.name + ".old")
            final.rename(old)
            partial.rename(final)
            shutil.rmtree(old)
        else:
            partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cache_kind(graph: gs.Graph) -> str:
    """`shared`: past and present may be one buffer of the maximum length; `concat`: present is a longer copy of past."""
    present = [t for t in graph.outputs if t.name.startswith("present.")]
    in_place = all(t.inputs and t.inputs[0].op == "GroupQueryAttention" for t in present)
    return "shared" if in_place else "concat"


def specs(tensors: list[gs.Variable]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(t.name, np.dtype(t.dtype).name, tuple(t.shape)) for t in tensors)


def summary(request: Request) -> dict[str, Any]:
    """The request without paths of this machine: the same input gives the same bytes anywhere."""
    fields = asdict(request)
    return {key: value for key, value in fields.items() if key not in ("model", "out", "targets")}
