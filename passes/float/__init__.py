"""The graph as exported -> FLOAT: norms, GELUs and rotary embeddings are single operators again, and each linear is
MatMul(x, constant [K, N]) named after its module. Nothing here quantizes; imports `core` only.

    fold_norms       loud weights of norms go into the columns behind them
    smooth_inputs    what is loud behind a norm does, before inputs become int8
    smooth_products  and what is loud in a gated product, from the rows before it
    scaled           weights whose rows or columns are multiplied while they are read
"""
