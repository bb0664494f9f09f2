"""The C++/CUDA kernels of csrc/cuda, launched on torch's current stream."""

import torch

from .. import _C
from .native import bind

globals().update(bind(_C.cuda, "cuda", lambda device: torch.cuda.current_stream(device).cuda_stream))
