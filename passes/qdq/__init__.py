"""FLOAT -> canonical Q/DQ, the plain ONNX that states a quantization (the twin), and Q/DQ -> Q/DQ: orders of inputs
folded, linears joined, logits cut to the last position. `insert_qdq` and `tables` also say how a lowering finds a
quantized linear or table. Imports `core` only.
"""
