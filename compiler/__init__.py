"""The compiler as a library: a checkpoint or an .onnx file goes in, artifacts for the targets come out.

`compile.py` is the one road, and a table of contents: request -> frontend/ -> decide and quant/ -> plan and pipeline ->
write and backend/ -> artifact/, with accuracy/ to verify and serving/ to hand on. It prints nothing and reads no
command line. It may import the passes and the plugins' definitions, and nothing of the tools; torch, TensorRT and what
makes reports only inside the functions that need them.
"""
