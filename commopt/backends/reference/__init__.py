"""The definition of every op, in plain torch. Other backends have the same names, arguments and bits.

Arguments that all ops share:
    x: float32, bfloat16 or float16 [n], the gradient; only read.
    residual: float32 [n] in unscaled gradient units, or None. acc = x + residual * loss_scale is what gets encoded, and
        residual <- (acc - decoded) / loss_scale. Where acc is not finite the residual keeps its value.
    loss_scale: float32 [1], the factor the loss was multiplied with, 1 without a GradScaler.
    out: float32, bfloat16 or float16 [n] <- weight * (row 0 + row 1 + ...), added in float32 in rank order.
    A field is 1-D when encoded and [rows, count] when decoded; rows may be any number of bytes apart.

No operation is fused with another, so that each is rounded alike everywhere. A NaN that enters a message is always
0x7fc00000: machines differ in the bits of the NaN that they compute. A decoder accepts any bytes.
"""

from .dense import dense_decode_sum, dense_encode
from .half import half_decode_sum, half_encode
from .floats import absmax, float_decode_sum, float_encode
from .quant import quant_decode_sum, quant_encode, quant_resum
from .quant_shared import quant_absmax, quant_decode_shared, quant_encode_shared
from .ternary import TERNARY_BLOCKS, ternary_decode_sum, ternary_encode
from .sign import sign_decode_sum, sign_encode, sign_vote
from .hadamard import hadamard_decode, hadamard_encode, hadamard_keep
from .topk import TILE, sparse_add, topk_decode_sum, topk_encode, topk_workspace
from .threshold import threshold_encode, threshold_workspace
from .blocktopk import blocktopk_add, blocktopk_decode_sum, blocktopk_encode
from .bits import bits_pack, bits_unpack
from .eliasfano import eliasfano_pack, eliasfano_unpack
from .randomk import randomk_decode_sum, randomk_encode
