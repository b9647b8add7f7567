"""Graph to graph: an onnx-graphsurgeon graph goes in, is changed in place and comes out. Subfolders by stage, in
pipeline order: `float`, `qdq`, then `ort` or `tensorrt`, which share `gemm`; `core` is what all share. The order of
passes is said in compiler/pipeline.py. A pass reads no weight and writes no file; nothing here imports the compiler.
"""
