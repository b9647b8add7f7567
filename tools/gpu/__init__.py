"""The kernels on a machine with a GPU: built, tried, tested, timed (check.py), and engines of TensorRT-RTX (rtx.py).

Such a machine may have torch, numpy, ml_dtypes and pytest alone: no module here needs more to
be imported, and each program runs as `python -m instantrt.tools.gpu.NAME` from a checkout.
"""
