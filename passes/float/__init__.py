"""The graph as exported -> FLOAT: norms, GELUs and rotary embeddings are single operators again, and each linear is
MatMul(x, constant [K, N]) named after its module. Nothing here knows of quantization; imports `core` only.
"""
