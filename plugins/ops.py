"""All operations of ours: a list, not a registry."""

from instantrt.plugins.cpu.attention import OP as ATTENTION
from instantrt.plugins.cpu.attention_by_token import OP as ATTENTION_BY_TOKEN
from instantrt.plugins.cpu.norm import OP as NORM
from instantrt.plugins.cpu.op import GEMM, ROWS
from instantrt.plugins.cpu.whole_attention import OP as WHOLE_ATTENTION
from instantrt.plugins.weight_only_gemm.op import OP as WEIGHT_ONLY_GEMM

DOMAIN = "instantrt"  # ONNX domain and TensorRT plugin namespace
OPS = (WEIGHT_ONLY_GEMM, GEMM, ROWS, ATTENTION, ATTENTION_BY_TOKEN, WHOLE_ATTENTION, NORM)
