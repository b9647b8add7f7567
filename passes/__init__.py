"""Graph to graph: the passes, the arithmetic of quantization, and what must hold between them."""
