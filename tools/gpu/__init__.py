"""The kernels on a machine with a GPU: built, tried, tested, timed; and engines of TensorRT-RTX.

    check, stages                one command for all of it, and its stages
    libraries                    what is built for them
    watch, progress              cases in child processes that may hang or crash; the events of pytest for it
    library, gemm, small         the kernels' C interface; WeightOnlyGemm on torch's memory; a small launch of every row
    bench, tune, race, layers    kernels and peers timed, every row of the table timed; how, and on which layers
    roofs                        what the GPU reaches, and whether it is as the kernels assume
    profile, ncu                 a few launches under Nsight Compute, and what it says of them
    triton_gemm                  a peer, and alone in needing Triton: the benchmark imports it where it is to run
    predictions                  what was expected of the kernels before they ran
    goals, tables, plot          what is to be reached; what a person reads of the measurements; the roofline plot
    rtx, rtx_prepare             engines that a CPU built: loaded and compared here; prepared there
    rtx_speed                    and how fast a model of theirs is beside PyTorch

Such a machine may have torch, numpy, ml_dtypes and pytest alone: no other module here needs more to be imported, and
each program runs as `python -m instantrt.tools.gpu.NAME` from a checkout.
"""
