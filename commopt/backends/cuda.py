"""The C++/CUDA kernels of csrc/cuda, launched on torch's current stream."""

import torch

from .. import _C
from .native import bind

# As code that torch.compile has made asks for it; torch.cuda.current_stream builds a Stream at each call.
globals().update(bind(_C.cuda, "cuda", lambda device: torch._C._cuda_getCurrentRawStream(device.index)))
