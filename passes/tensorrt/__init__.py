"""Canonical Q/DQ -> strongly typed TensorRT: compute type, caches in place, the plugin's WeightOnlyGemm or native Q/DQ,
and for old releases the operators that they have. What comes out keeps the rules of `verify.Stage.TENSORRT`. Imports
`core`, `qdq` and, for the plugin's node, the op definitions in `plugins`.
"""
