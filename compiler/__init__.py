"""InstantRT's compiler: from a checkpoint or an .onnx file to artifacts."""
