"""Is this artifact right, and what did quantization cost?

Two kinds of difference, never mixed:

    lowering error       artifact against the canonical Q/DQ twin: rounding only, bounded by the artifact's arithmetic
    quantization error   twin against the float model: what the user pays, in output error, KL, agreement, perplexity

In come a plan, the artifacts written from it and a text; out come verdicts and reports, and for a budget the formats of
the layers. Nothing here prints. Only reports need Polygraphy and matplotlib, only the form `transformers` needs that.
"""
