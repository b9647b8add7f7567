"""Which passes run, in which order, and what each may assume of the ones before it: the table of contents."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.compiler.backend.kernels import refuse_lacking, with_kernels
from instantrt.compiler.backend.tensorrt.profiles import EngineLimits
from instantrt.compiler.options import TableFormat
from instantrt.compiler.quant.config import or_ignore
from instantrt.compiler.request import Request
from instantrt.compiler.serving.runtime.saturation import NEEDED
from instantrt.compiler.target import Target
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FLOAT32, Array
from instantrt.passes.core.linear import Linear, linear
from instantrt.passes.core.names import MASK, PAST
from instantrt.passes.core.quant import Quantizer, QuantTensor
from instantrt.passes.core.rewrite import Lowering, Pass, PassLog, run
from instantrt.passes.core.subgraphs import every_node
from instantrt.passes.core.verify import Stage, verify
from instantrt.passes.float.drop_identity import DropIdentity
from instantrt.passes.float.fold_norms import FoldNorms
from instantrt.passes.float.fuse_gelu import FuseGelu
from instantrt.passes.float.fuse_rms_norm import FoldSmallConstants, FuseRmsNorm
from instantrt.passes.float.fuse_rotary import FuseRotaryEmbedding, HalveRotaryAngles
from instantrt.passes.float.normalize_gemm import NormalizeGemm
from instantrt.passes.float.normalize_linears import NormalizeMatMul
from instantrt.passes.float.smooth_inputs import SmoothInputs
from instantrt.passes.float.smooth_products import SmoothProducts
from instantrt.passes.gemm.epilogues import EPILOGUES
from instantrt.passes.ort.attention import attention
from instantrt.passes.ort.cpu_attention import LowerCpuAttention
from instantrt.passes.ort.cpu_gemm import FuseResidual, LowerCpuGemm
from instantrt.passes.ort.cpu_norm import LowerCpuNorm
from instantrt.passes.ort.cpu_rows import ShareTable
from instantrt.passes.ort.cpu_whole_attention import LowerCpuWholeAttention
from instantrt.passes.ort.in_half import KeepFloatLinearsInHalf, KeepScalesInHalf, KeepTablesInHalf
from instantrt.passes.ort.limbs import may_saturate
from instantrt.passes.ort.linear import linear_passes
from instantrt.passes.ort.packed import PackQueryKeyValue
from instantrt.passes.ort.partial_rotary import RotateWholeHeads
from instantrt.passes.ort.rotary import RotateInAttention
from instantrt.passes.ort.sum_into_norm import SumIntoNorm
from instantrt.passes.ort.tables import QuantizeTables
from instantrt.passes.ort.whole_attention import LowerToAttention
from instantrt.passes.qdq.correct_biases import CorrectBiases
from instantrt.passes.qdq.fold_order import FoldOrder
from instantrt.passes.qdq.insert_qdq import Decisions, InsertDequantize, quantized
from instantrt.passes.qdq.join_linears import JoinLinears, parts_of
from instantrt.passes.qdq.last_logits import LastLogits
from instantrt.passes.qdq.quantize_activations import QuantizeActivations
from instantrt.passes.qdq.sort_inputs import SortInputs
from instantrt.passes.tensorrt.cast_compute_type import cast_compute_type
from instantrt.passes.tensorrt.decompose_attention import DecomposeAttention
from instantrt.passes.tensorrt.decompose_rms_norm import DecomposeRmsNorm
from instantrt.passes.tensorrt.decompose_rotary import DecomposeRotary
from instantrt.passes.tensorrt.explicit_mask import ExplicitMask
from instantrt.passes.tensorrt.explicit_scales import ExplicitScales
from instantrt.passes.tensorrt.kv_in_place import kv_in_place
from instantrt.passes.tensorrt.lower_native_int8 import LowerNativeInt8
from instantrt.passes.tensorrt.lower_native_tables import LowerNativeTables
from instantrt.passes.tensorrt.lower_native_weight_only import LowerNativeWeightOnly
from instantrt.passes.tensorrt.lower_weight_only_gemm import LowerWeightOnlyGemm
from instantrt.passes.tensorrt.old_parser import OLD_OPSET, unsupported
from instantrt.plugins.ops import DOMAIN

# Whole operators, then linears as MatMul(x, constant [K, N]) named after their modules.
FLOAT: tuple[Pass, ...] = (
    DropIdentity(),
    FoldSmallConstants(),  # Gemma's norms are scaled by `1 + weight`
    FuseRmsNorm(),
    HalveRotaryAngles(),  # the cosine and the sine
    HalveRotaryAngles(),  # and the factor behind them
    FuseRotaryEmbedding(),
    FuseGelu(),
    NormalizeGemm(),
    NormalizeMatMul(),
)

# The whole operators of opset 23 as those before it, for a graph that also has what lost its kernel by then.
APART: tuple[Pass, ...] = (DecomposeAttention(FLOAT32), DecomposeRmsNorm(FLOAT32), DecomposeRotary())
WHOLE = 23  # the opset that has Attention
# Domains of ONNX Runtime: no parser of TensorRT has an operator of them.
FOREIGN = ("com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc", "ai.onnx.ml", "ai.onnx.preview.training")


def normalize(graph: gs.Graph, log: PassLog) -> gs.Graph:
    """The graph as exported -> FLOAT, at an opset that ONNX Runtime has kernels for: its twin is run there.

    One that has none at any is left as it is: a GPU may have what is lacking.
    """
    run(graph, FLOAT, log)
    verify(graph, Stage.FLOAT)
    if with_kernels(graph) is None and with_kernels(run(graph.copy(), APART, PassLog())) is not None:
        with_kernels(run(graph, APART, log))
    return graph


def linears(graph: gs.Graph) -> list[Linear]:
    """The linears of a normalized graph, in its order."""
    return [found for node in graph.nodes if (found := linear(node)) is not None]


def fold_norms(graph: gs.Graph, decisions: Decisions, log: PassLog) -> tuple[gs.Graph, Decisions]:
    """The FLOAT graph with its norms folded into what will be quantized, and the decisions for the weights it has."""
    ours = frozenset(p for p, q in decisions.items() if isinstance(q, QuantTensor) and isinstance(q.source, Quantizer))
    if not ours:
        return graph, decisions
    folded = run(graph.copy(), [FoldNorms(ours)], log)
    return folded, of_graph(decisions, folded)


def smooth_inputs(
    graph: gs.Graph, decisions: Decisions, factors: Mapping[str, Array], paths: Set[str], log: PassLog
) -> tuple[gs.Graph, Decisions]:
    """The FLOAT graph with loud inputs of the linears at `paths` shared with their columns, and decisions for those."""
    ours = frozenset(paths)
    smoothed = run(graph.copy(), [SmoothInputs(factors, ours), SmoothProducts(factors, ours)], log)
    return smoothed, of_graph(decisions, smoothed)


def of_graph(decisions: Decisions, graph: gs.Graph) -> Decisions:
    """The same decisions for the weights that `graph` has."""
    weights = {found.path: found.rows for found in linears(graph)}
    return {
        path: replace(q, source=replace(q.source, weight=weights[path]))
        if isinstance(q, QuantTensor) and isinstance(q.source, Quantizer)
        else q
        for path, q in decisions.items()
    }


def quantize(graph: gs.Graph, decisions: Decisions, log: PassLog, *, tables: TableFormat | None = None) -> gs.Graph:
    """Canonical Q/DQ, which ONNX Runtime runs as it is: the twin that every lowering is held against.

    tables   what those of embeddings become in the one form that ONNX Runtime has for codes: as they are stored, where
             that is in codes, or all int8; None: they stay float
    """
    passes: tuple[Pass, ...] = (
        SortInputs(decisions),
        CorrectBiases(decisions),
        InsertDequantize(decisions),
        FoldOrder(frozenset(t.name for t in graph.outputs)),
        # Behind the weights, which say what is quantized, and in the order they want, which the layers before may give.
        QuantizeActivations(),
        *((QuantizeTables(floats=tables == "int8"),) if tables else ()),
    )
    run(graph, passes, log)
    verify(graph, Stage.QDQ)
    return graph


def lower_onnxruntime(graph: gs.Graph, target: Target, request: Request, log: PassLog, longest: int = 0) -> gs.Graph:
    """Explicit operators of ONNX Runtime's CPU provider, which has a kernel for each.

    longest   tokens of a sequence, 0 where it is not known
    """
    ours = request.library(target) is not None
    passes: list[Pass] = (
        [] if request.portable else [RotateWholeHeads(), *attention(by_token=ours), RotateInAttention(longest)]
    )
    if steps := is_causal_lm(graph):
        passes += [*last_logits(graph, request, by_mask=True), JoinLinears(gated=not ours), PackQueryKeyValue()]
    else:
        passes += [
            *([LowerToAttention()] if graph.opset >= WHOLE else []),
            JoinLinears(gated=False) if ours else SumIntoNorm(),
        ]
    if ours:
        passes += [LowerCpuGemm(request.cpu_preset, steps), *EPILOGUES, FuseResidual(), ShareTable()]
        passes += [
            LowerCpuAttention(request.kv_cache_type, request.cpu_preset),
            LowerCpuWholeAttention(),
            LowerCpuNorm(),
        ]
    passes += linear_passes(request.cpu_preset, steps=steps, signed=not target.saturates)
    # Last: what is float by now stays float, and scales, in their 16 bits. Tables first: a tied head then finds the one
    # it shares.
    passes += [KeepTablesInHalf(), KeepFloatLinearsInHalf(), KeepScalesInHalf()]
    run(graph, passes, log)
    refuse_leftovers(graph, log, "ONNX Runtime")
    if request.kv_cache_type == "float16":
        refuse_wide_cache(graph, log)
    if any(may_saturate(node) for node in every_node(graph)):
        graph.doc_string = NEEDED
    verify(graph, Stage.ONNXRUNTIME)
    refuse_lacking(graph)
    return graph


def last_logits(graph: gs.Graph, request: Request, *, by_mask: bool) -> list[Pass]:
    """The head of a causal LM for the last token alone, unless all were asked for; other models keep their logits."""
    if request.logits == "last" and is_causal_lm(graph):
        return [LastLogits(by_mask and any(t.name == MASK for t in graph.inputs)), QuantizeActivations()]
    return []


def is_causal_lm(graph: gs.Graph) -> bool:
    """Has the graph a cache to decode with? Any other model meets many rows at every call."""
    return any(t.name.startswith(PAST) for t in graph.inputs)


def lower_tensorrt(
    graph: gs.Graph, target: Target, dtype: np.dtype[Any], request: Request, limits: EngineLimits, log: PassLog
) -> gs.Graph:
    """Strongly typed TensorRT in the compute type `dtype`: plugin nodes where a library is given, else native forms."""
    refuse_foreign(graph)
    in_place = request.kv_cache == "in-place"
    passes: list[Pass] = [ExplicitMask(), *(kv_in_place(limits.max_length) if in_place else ())]
    passes += last_logits(graph, request, by_mask=in_place)
    passes += [JoinLinears(gated=request.plugin is None)]
    if request.embeddings == "int8":
        passes += [LowerNativeTables(dtype)]
    # Types first: the lowerings then build each constant once, in the type it has in the engine.
    passes += cast_compute_type(dtype)
    if request.plugin is not None:
        lower = LowerWeightOnlyGemm(dtype, request.plugin_rounding, request.plugin_batch_invariant)
        passes += [lower, *EPILOGUES]
    run(graph, passes, log)
    if request.embeddings == "int8":
        refuse_no_table(log, LowerNativeTables)
    lower_native(graph, dtype, log, wide=target.wide_int8)
    if not target.rtx:  # TensorRT-RTX takes any block: docs/facts.md, "Blocks that full TensorRT documents"
        run(graph, [ExplicitScales()], log)
    return graph if target.whole_operators else decompose(graph, dtype, log)


def lower_native(graph: gs.Graph, dtype: np.dtype[Any], log: PassLog, *, wide: bool) -> gs.Graph:
    """Every quantized linear in the form that TensorRT fuses, or a UserError that says why one has none."""
    passes: tuple[Lowering[Any], ...] = LowerNativeWeightOnly(dtype), LowerNativeInt8(dtype, wide)
    run(graph, passes, log)
    refuse_leftovers(graph, log, "TensorRT without plugins")
    verify(graph, Stage.TENSORRT)
    return graph


def refuse_leftovers(graph: gs.Graph, log: PassLog, backend: str) -> None:
    """A quantized linear that no lowering took is an error that gives their reasons, never a slow or other form."""
    left = [node.name for node in graph.nodes if quantized(node) is not None]
    if left:
        reasons = dict.fromkeys(e.reason for e in log.entries if e.node == left[0] and e.reason)
        raise UserError(
            f"{backend} has no form for this quantized layer",
            where=left[0] + (f", and {len(left) - 1} more" if left[1:] else ""),
            found="; ".join(reasons),
            fix="another --group-size, --weight-only for 8-bit GPTQ"
            + or_ignore(path for name in left for path in parts_of(name)),
        )


def refuse_foreign(graph: gs.Graph) -> None:
    """Operators that ONNX Runtime alone has are refused here: an engine's parser would, on another machine."""
    for node in every_node(graph):
        if node.domain in FOREIGN:
            raise UserError(
                f"TensorRT has no {node.domain}::{node.op}",
                where=node.name or node.outputs[0].name,
                expected="operators of the ONNX standard",
                fix="export the model without the fusions of ONNX Runtime",
            )


def refuse_wide_cache(graph: gs.Graph, log: PassLog) -> None:
    """A cache that was to be float16 and could not, with the reasons."""
    left = [t for t in graph.inputs if t.name.startswith(PAST) and t.dtype == FLOAT32]
    if left:
        said = (e.reason for e in log.entries if isinstance(e.by, LowerCpuAttention) and e.target == log.target)
        raise UserError(
            "this cache cannot be float16",
            where=left[0].name,
            expected="attention that CpuAttention computes",
            found="; ".join(dict.fromkeys(filter(None, said))) or "attention that stays standard operators",
            fix="leave --kv-cache-type out",
        )


def refuse_no_table(log: PassLog, by: type[Pass]) -> None:
    """An option that did nothing is an error, with the reasons."""
    said = [entry for entry in log.entries if isinstance(entry.by, by) and entry.target == log.target]
    if all(entry.reason for entry in said):
        reasons = dict.fromkeys(entry.reason for entry in said)
        raise UserError("embeddings int8: no table takes it", found="; ".join(reasons), fix="leave it out")


def decompose(graph: gs.Graph, dtype: np.dtype[Any], log: PassLog) -> gs.Graph:
    """A graph lowered for TensorRT, for the releases before the operators of opset 23: every node is one of theirs.

    Last of all: what comes before matches whole operators.
    """
    run(graph, [DecomposeAttention(dtype), DecomposeRmsNorm(dtype), DecomposeRotary()], log)
    reasons = {entry.node: entry.reason for entry in log.rejected()}
    lines = [f"{n.name} ({n.op}): {reasons.get(n.name) or f'its parser {why}'}" for n, why in unsupported(graph)]
    if lines:
        raise UserError(
            "TensorRT 10.4, the last for Volta, cannot take this graph",
            expected="operators that its ONNX parser has",
            found="\n".join(lines),
            fix="another target, or another --quant or --group-size where a weight is named",
        )
    graph.opset = OLD_OPSET
    own = [domain for domain in graph.import_domains or () if domain.domain == DOMAIN]
    # Else the exporter would write the opset of before.
    graph.import_domains = [onnx.helper.make_opsetid("", OLD_OPSET), *own]
    return graph
