"""Operations of our own: each written once as data (`schema.py`), with its NumPy reference, kernels and TensorRT layer.

An op definition (`<op>/op.py`) flows to the pass that builds its node, the evaluation on a CPU, the tests and the
generated C++ header; `runtime/` is C++ that all of them share, `lib/` what `make plugins` builds. Imports NumPy,
ml_dtypes and nothing of the other packages.
"""
