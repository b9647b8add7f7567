"""Every artifact runs once before it is published: a short random prompt, in a fresh process, against the twin.

`run` goes through the targets of a plan. For each, `subject` says what is run and held against, `ask` has the answers
of every form, `judge` holds them against the twin's, `original` against the .onnx file that was given, and `ran` is
what is said. Below them: `steps` are the inputs, `process` runs ONNX files in a child (`child`: numpy and ONNX Runtime
alone), `lockstep` evaluates a graph here, `on_gpu` an engine, `compare` measures distances, `explain` looks for the
first wrong layer. Imported by `compiler.compile` and `compiler.check`.
"""
