"""Volta's build: its device code goes through NVRTC 12, as nvcc 13 has none (docs/facts.md, "Compilers for Volta").

`nvrtc.py` turns a kernel file of the operations into C++ that carries its machine code and runs it through the driver
(`device.h`); `std.h` is what NVRTC needs of the standard headers. Stands alone: it is also run by file name, where
nothing of this project is installed.
"""
