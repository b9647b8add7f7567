"""Graph to graph: the passes, the arithmetic of quantization, and what must hold between them."""

from onnx_graphsurgeon.logger import G_LOGGER

G_LOGGER.severity = G_LOGGER.ERROR  # its warnings (no colours, bf16 has no NumPy type) say nothing to a user
