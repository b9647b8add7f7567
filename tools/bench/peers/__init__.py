"""What runs where a peer is installed, in a Python of its own: each script is started by its file name.

    cpu_worker      a process that holds one model and does one measurement at a time
    cpu_models      what it may hold, ours and those of peers
    cpu_gguf        a checkpoint as a GGUF file that llama.cpp quantized

They import nothing of ours but for our own artifacts. This folder is the first in which they look for a library: no
module here may be called as one is.
"""
