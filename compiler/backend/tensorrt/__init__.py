"""TensorRT engines: who builds one (choose), in a child process (build, child), and what finishes it elsewhere (kit).

A lowered .onnx file and `EngineSettings` go in; model.engine and its part of the manifest, or a kit, come out.
`profiles.py` makes shape ranges of a user's limits, `fusion.py` reads the builder's table of kernels, `header.py` an
engine's first bytes, `gpu.py` asks the driver. TensorRT is imported in the child alone, and by name: the same code
serves TensorRT 10, 11 and RTX.
"""
