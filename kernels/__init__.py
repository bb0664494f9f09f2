"""The ops as Triton kernels, for CUDA and HIP. commopt/backends/triton.py checks the arguments and launches them.

A program owns one tile of the gradient. Offsets are 64-bit. Nothing is fused: every launch passes enable_fp_fusion=False,
division is tl.div_rn, and tl.floor, which flushes denormals, is not used. With that the bits are those of
commopt/backends/reference/. Kernels that read one field of several rows get the row stride in elements.
"""
