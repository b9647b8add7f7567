"""Every artifact runs once before it is published: a short random prompt, in a fresh process, against the twin.

`steps` says what is asked, `process` runs an ONNX file in a child (`child`: numpy and ONNX Runtime alone), `lockstep`
has the twin's answers, `compare` says how far they are apart, `run` goes through the targets of a plan, and `original`
does the same with the .onnx file that was given. Imported by `compiler.compile` and `compiler.check`.
"""
