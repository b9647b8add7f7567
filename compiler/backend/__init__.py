"""Lowered graphs become files: `onnx_writer.py` writes .onnx with external data, tensorrt/ engines and build kits.

A `gs.Graph` of lazy constants goes in; bytes are made here, tile by tile, and nowhere before. Nothing here decides how
a layer is quantized, and no graph is changed but for small constants that the file itself holds.
"""
