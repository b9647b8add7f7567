"""Is this artifact right, and what did quantization cost?

Two kinds of difference, never mixed:

    lowering error       artifact against the canonical Q/DQ twin: rounding only, bounded by the artifact's arithmetic
    quantization error   twin against the float model: what the user pays, in output error, KL, agreement, perplexity
"""

from instantrt.passes.core.errors import require

require("accuracy", "an accuracy report")
