"""InstantRT: an ahead-of-time compiler from checkpoints to deployable artifacts with quantized weights."""

import os

# ONNX Runtime's Linux wheels report home by default; the switch is read when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
