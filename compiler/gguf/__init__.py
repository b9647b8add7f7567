"""GGUF files: their headers, and the checkpoint's folder that each one stands for."""
