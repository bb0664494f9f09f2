"""One compression method per file. Importing this package registers them all."""

from .base import STEADY, Compressor, all_finite, compressors, never_larger, overview, parse, register, wire_bytes
from .none import NoCompression
from .bf16 import BF16
from .fp16 import FP16
from .fp8 import FP8
from .mx import MXFP4, MXFP8
from .natural import Natural
from .nvfp4 import NVFP4
from .quantize import Int2, Int4, Int8
from .ternary import Ternary
from .sign import Sign
from .vote import Vote
from .topk import TopK
from .randomk import RandomK
from .powersgd import PowerSGD
from .dct import DCT
from .hierarchical import Hierarchical

__all__ = ["STEADY", "Compressor", "all_finite", "compressors", "never_larger", "overview", "parse", "register", "wire_bytes"]
