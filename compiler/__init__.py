"""The compiler as a library: a checkpoint, a GGUF file or an .onnx file goes in, artifacts for the targets come out.

`compile.py` is the whole way, and a table of contents: request -> frontend/ -> decide and quant/ -> plan and pipeline
-> write and backend/ -> artifact/, with accuracy/ to verify and serving/ to hand on.

    request, options   what a user asks for: one frozen value, made of groups of options, each written once
    kinds              of what kind a value from Python has to be
    target, support    what can be compiled for, a row a target; what has been shown for each method and target
    checkpoint         safetensors files as references; no bytes are read
    early              what options and the files of a checkpoint decide, refused before anything is exported
    decide             request and checkpoint -> the one quantization of each layer
    fit                formats, scales and codes fitted to what the model does, where that is asked for
    plan               what will be written, decided before a byte is: formats, graphs, who builds each engine
    pipeline           which passes run, in which order
    write              what was planned -> the folders of the targets, and the manifest
    compile            `compile_model`: all of it, with verification and publishing
    check, inspect     is an artifact what was written, and does it load; what a checkpoint is and would become
    llm, encoder       an artifact in this process: `LLM`, `load_artifact`; `Embedder`, `Classifier`
    here               which of several artifacts this machine can run

It prints nothing and reads no command line. It may import the passes and the plugins' definitions, and nothing of the
tools; torch, TensorRT and what makes reports only inside the functions that need them.
"""
