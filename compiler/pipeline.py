"""Which passes run, in which order, and what each may assume of the ones before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.compiler.backend.tensorrt.profiles import Limits
from instantrt.compiler.quant.config import or_ignore
from instantrt.compiler.request import Request
from instantrt.compiler.target import Target
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.linear import NORMALIZE_LINEARS, Linear, linear
from instantrt.passes.core.rewrite import PassLog, Rewrite, run
from instantrt.passes.core.verify import Stage, verify
from instantrt.passes.float.fuse_gelu import FuseGelu
from instantrt.passes.float.fuse_rms_norm import FUSE_RMS_NORM
from instantrt.passes.float.fuse_rotary import FUSE_ROTARY
from instantrt.passes.ort.attention import ATTENTION
from instantrt.passes.ort.limbs import ONE_LIMB_ARM, ONE_LIMB_X86
from instantrt.passes.ort.linear import linear_passes
from instantrt.passes.ort.tables import AS_STORED, QuantizeTables
from instantrt.passes.qdq.fold_order import FoldOrder
from instantrt.passes.qdq.insert_qdq import Decisions, InsertDequantize, QuantizeActivations, quantized
from instantrt.passes.qdq.join_linears import JoinLinears, parts_of
from instantrt.passes.qdq.last_logits import LastLogits
from instantrt.passes.qdq.sort_inputs import SortInputs
from instantrt.passes.qdq.tables import LowerNativeTables
from instantrt.passes.tensorrt.cast_compute_type import cast_compute_type
from instantrt.passes.tensorrt.decompose_attention import DecomposeAttention
from instantrt.passes.tensorrt.decompose_rms_norm import DecomposeRmsNorm
from instantrt.passes.tensorrt.decompose_rotary import DecomposeRotary
from instantrt.passes.tensorrt.explicit_scales import ExplicitScales
from instantrt.passes.tensorrt.fuse_weight_only_gemm import FUSE_WEIGHT_ONLY_GEMM
from instantrt.passes.tensorrt.kv_in_place import kv_in_place
from instantrt.passes.tensorrt.lower_native_int8 import LowerNativeInt8
from instantrt.passes.tensorrt.lower_native_weight_only import LowerNativeWeightOnly
from instantrt.passes.tensorrt.lower_weight_only_gemm import LowerWeightOnlyGemm
from instantrt.passes.tensorrt.old_parser import OPSET, unsupported
from instantrt.plugins.ops import DOMAIN


def normalize(graph: gs.Graph, ledger: PassLog) -> gs.Graph:
    """FLOAT: whole norms, GELUs, rotary embeddings; linears are MatMul(x, constant [K, N]) named after the module."""
    run(graph, (*FUSE_RMS_NORM, *FUSE_ROTARY, FuseGelu(), *NORMALIZE_LINEARS), ledger)
    verify(graph, Stage.FLOAT)
    return graph


def linears(graph: gs.Graph) -> list[Linear]:
    """The linears of a normalized graph, in its order."""
    return [found for node in graph.nodes if (found := linear(node)) is not None]


def quantize(graph: gs.Graph, decisions: Decisions, ledger: PassLog) -> gs.Graph:
    """Canonical Q/DQ, which ONNX Runtime runs as it is: the twin that every lowering is held against."""
    outputs = frozenset(t.name for t in graph.outputs)
    # Weights first: an activation is quantized because the weight it meets says so. It is quantized in the order the
    # weight wants, which the layers before may deliver.
    weights = (SortInputs(decisions), InsertDequantize(decisions), FoldOrder(outputs))
    run(graph, (*weights, QuantizeActivations()), ledger)
    verify(graph, Stage.QDQ)
    return graph


def lower_onnxruntime(graph: gs.Graph, target: Target, request: Request, ledger: PassLog) -> gs.Graph:
    """Explicit operators of ONNX Runtime's CPU provider."""
    passes: list[Rewrite[Any]] = []
    if not request.portable:
        passes += ATTENTION
    one_limb = ONE_LIMB_ARM if target.name == "armv9" else ONE_LIMB_X86
    passes += linear_passes(request.cpu_preset, one_limb)
    if request.embeddings == "int8":
        passes.append(QuantizeTables())
    # Last: what is float by now stays float, in the 16 bits it is stored in.
    passes += AS_STORED
    run(graph, passes, ledger)
    refuse_leftovers(graph, ledger, "ONNX Runtime")
    verify(graph, Stage.ONNXRUNTIME)
    return graph


def refuse_leftovers(graph: gs.Graph, ledger: PassLog, backend: str) -> None:
    """A quantized linear that no lowering took is an error that gives their reasons, never a slow or other form."""
    left = [node.name for node in graph.nodes if quantized(node) is not None]
    if left:
        reasons = dict.fromkeys(e.reason for e in ledger.entries if e.node == left[0] and e.reason)
        raise UserError(
            f"{backend} has no form for this quantized layer",
            where=left[0] + (f", and {len(left) - 1} more" if left[1:] else ""),
            found="; ".join(reasons),
            fix="another --group-size, --weight-only for 8-bit GPTQ"
            + or_ignore(path for name in left for path in parts_of(name)),
        )


def lower_tensorrt(
    graph: gs.Graph, target: Target, dtype: np.dtype[Any], request: Request, limits: Limits, ledger: PassLog
) -> gs.Graph:
    """Strongly typed TensorRT in the compute type `dtype`: plugin nodes where a library is given, else native forms."""
    if request.logits == "last":
        run(graph, [LastLogits(), QuantizeActivations()], ledger)
    if request.kv_cache == "in-place":
        kv_in_place(graph, limits.max_length, ledger)
    run(graph, [JoinLinears(gated=request.plugin is None)], ledger)
    if request.embeddings == "int8":
        run(graph, [LowerNativeTables(dtype)], ledger)
    # Types first: the lowerings then build each constant once, in the type it has in the engine.
    cast_compute_type(graph, dtype, ledger)
    if request.plugin is not None:
        run(graph, [LowerWeightOnlyGemm(dtype, request.plugin_rounding), *FUSE_WEIGHT_ONLY_GEMM], ledger)
    lower_native(graph, dtype, ledger)
    if not target.rtx:  # TensorRT-RTX was seen to take any block
        run(graph, [ExplicitScales()], ledger)
    return graph if target.whole_operators else decompose(graph, dtype, ledger)


def decompose(graph: gs.Graph, dtype: np.dtype[Any], ledger: PassLog) -> gs.Graph:
    """A graph lowered for TensorRT, for the releases before the operators of opset 23: every node is one of theirs.

    Last of all: what comes before matches whole operators.
    """
    run(graph, [DecomposeAttention(dtype), DecomposeRmsNorm(dtype), DecomposeRotary()], ledger)
    reasons = {entry.node: entry.reason for entry in ledger.rejected()}
    lines = [f"{n.name} ({n.op}): {reasons.get(n.name) or f'its parser {why}'}" for n, why in unsupported(graph)]
    if lines:
        raise UserError(
            "TensorRT 10.4, the last for Volta, cannot take this graph",
            expected="operators that its ONNX parser has",
            found="".join(f"\n    {line}" for line in lines),
            fix="another target, or another --quant or --group-size where a weight is named",
        )
    graph.opset = OPSET
    own = [domain for domain in graph.import_domains or () if domain.domain == DOMAIN]
    graph.import_domains = [onnx.helper.make_opsetid("", OPSET), *own]  # else the exporter would write the old opset
    return graph


def lower_native(graph: gs.Graph, dtype: np.dtype[Any], ledger: PassLog) -> gs.Graph:
    """Every quantized linear in the form that TensorRT fuses, or a UserError that says why one has none."""
    run(graph, [LowerNativeWeightOnly(dtype), LowerNativeInt8(dtype)], ledger)
    refuse_leftovers(graph, ledger, "TensorRT without plugins")
    verify(graph, Stage.TENSORRT)
    return graph
