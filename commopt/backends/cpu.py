"""The C++ kernels of csrc/cpu: AVX-512, AVX2 or plain x86-64, chosen at run time. As many threads as torch uses."""

import os

import torch

from .. import _C
from .native import bind

globals().update(bind(_C.cpu, "cpu", lambda device: torch.get_num_threads()))

if "COMMOPT_ISA" in os.environ:
    _C.cpu.use_isa(os.environ["COMMOPT_ISA"])
