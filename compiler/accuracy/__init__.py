"""Is this artifact right, and what did quantization cost?

Two kinds of difference, never mixed:

    lowering error       artifact against the canonical Q/DQ twin: rounding only, bounded by the artifact's arithmetic
    quantization error   twin against the float model: what the user pays, in output error, KL, agreement, perplexity

In come a plan, the artifacts written from it and a text; out come verdicts and reports, and for a budget the formats of
the layers. Nothing here prints. Only reports need Polygraphy and matplotlib, only the form `transformers` needs that.

    run, subjects            what `--verify` and `diff` share; artifacts back to their request, and what is compared
    forms, runners           the forms of one model, and each as a function of a batch; engine_runner for engines
    data, metrics            the tokens that are run; how far two outputs are apart
    verify, bounds           the comparison and its verdicts; how far a lowered layer may be off
    layer_errors, bisect     errors by layer; the first pass and node where a lowering goes wrong
    budget, ladder           worst layers get finer formats until a bound holds; which there are for a layer
    perplexity               of an artifact or of transformers, on a text
    report, charts           HTML, JSON and pictures; polygraphy_files has what Polygraphy needs to repeat it
"""
