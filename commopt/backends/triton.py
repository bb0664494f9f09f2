"""The kernels of kernels/ on CUDA or HIP, launched on torch's current stream. With TRITON_INTERPRET=1 in the environment
before this is imported, they run on the CPU instead, to be tested without a GPU."""

from types import SimpleNamespace

import torch
import triton

from ..kernels import bits, blocktopk, dense, eliasfano, floats, half, hadamard, quant, quant_shared, randomk, sign, ternary, threshold, topk
from .native import bind

_TILE = 4096  # elements of one program, 16 to a thread
_PROGRAMS = 1024  # of a kernel whose programs take many tiles each: enough to fill the device
_WARPS = 8
_INTERPRETED = not isinstance(dense.dense_encode, triton.JITFunction)


def _launch(device, kernel, programs: int, *args, num_warps: int = _WARPS, **constants) -> None:
    if programs == 0:
        return
    if _INTERPRETED:
        kernel[(programs,)](*args, **constants)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](*args, **constants, num_warps=num_warps, enable_fp_fusion=False)


def _tiling(op: str, n: int, block: int) -> tuple[int, dict[str, int]]:
    """How many programs a block-wise kernel needs, and its constants."""
    if block < 8 or block % 8:
        raise ValueError(f"{op}: block must be a multiple of 8, got {block}")
    width = min(triton.next_power_of_2(block), _TILE)
    rows = _TILE // width
    return triton.cdiv(n, block * rows), {"BLOCK": block, "ROWS": rows, "WIDTH": width, "CHUNKS": triton.cdiv(block, width)}


def _signed(word: int) -> int:
    """The low 32 bits as the int32 that a kernel gets them as."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _draw(seed: int, step: int, stream: int) -> tuple[int, int, int, int]:
    """The key of random numbers, in words."""
    return _signed(seed), _signed(seed >> 32), _signed(step), _signed(stream)


def dense_encode(x, _, residual, loss_scale, n, values, values_dtype, device):
    _launch(device, dense.dense_encode, triton.cdiv(n, _TILE), x, residual, loss_scale, values, n, TILE=_TILE)


def dense_decode_sum(out, _, weight, n, rows, stride, values, values_dtype, device):
    _launch(device, dense.dense_decode_sum, triton.cdiv(n, _TILE), out, weight, values, rows, values.stride(0), n, TILE=_TILE)


def half_encode(x, _, residual, loss_scale, n, values, scales, block, device):
    programs, tiling = _tiling("half_encode", n, block)
    _launch(device, half.half_encode, programs, x, residual, loss_scale, values, scales, n, **tiling)


def half_decode_sum(out, _, weight, n, rows, stride, values, scales, block, device):
    programs, tiling = _tiling("half_decode_sum", n, block)
    strides = values.stride(0), scales.stride(0)
    _launch(device, half.half_decode_sum, programs, out, weight, values, scales, rows, *strides, n, **tiling)


def absmax(x, _, residual, loss_scale, n, out, divisor, device):
    bits = out.view(torch.int32).zero_()
    _launch(device, floats.absmax, triton.cdiv(n, _TILE), x, residual, loss_scale, bits, divisor, n, TILE=_TILE)


def float_encode(
    x, _, residual, loss_scale, n, codes, scales, whole, element, scaling, block, stochastic, seed, step, stream, device
):
    programs, tiling = _tiling("float_encode", n, block)
    draw = _draw(seed, step, stream)
    _launch(
        device, floats.float_encode, programs, x, residual, loss_scale, codes, scales, whole, *draw, n,
        ELEMENT=element, SCALING=scaling, STOCHASTIC=bool(stochastic), **tiling,
    )


def float_decode_sum(out, _, weight, n, rows, stride, codes, scales, whole, element, scaling, block, device):
    programs, tiling = _tiling("float_decode_sum", n, block)
    strides = codes.stride(0), scales.stride(0), 0 if whole is None else whole.stride(0)
    _launch(
        device, floats.float_decode_sum, programs, out, weight, codes, scales, whole, rows, *strides, n,
        ELEMENT=element, SCALING=scaling, **tiling,
    )


def quant_encode(x, _, residual, loss_scale, n, codes, scales, bits, block, stochastic, seed, step, stream, device):
    programs, tiling = _tiling("quant_encode", n, block)
    draw = _draw(seed, step, stream)
    _launch(
        device, quant.quant_encode, programs, x, residual, loss_scale, codes, scales, *draw, n,
        BITS=bits, STOCHASTIC=bool(stochastic), **tiling,
    )


def quant_decode_sum(out, _, weight, n, rows, stride, codes, scales, bits, block, device):
    programs, tiling = _tiling("quant_decode_sum", n, block)
    strides = codes.stride(0), scales.stride(0)
    _launch(device, quant.quant_decode_sum, programs, out, weight, codes, scales, rows, *strides, n, BITS=bits, **tiling)


def quant_resum(
    n, rows, stride, row_codes, row_scales, residual, loss_scale, codes, scales, bits, block, stochastic, seed, step, stream, device
):
    programs, tiling = _tiling("quant_resum", n, block)
    strides = row_codes.stride(0), row_scales.stride(0)
    draw = _draw(seed, step, stream)
    _launch(
        device, quant.quant_resum, programs, row_codes, row_scales, rows, *strides, residual, loss_scale, codes, scales, *draw, n,
        BITS=bits, STOCHASTIC=bool(stochastic), **tiling,
    )


def quant_absmax(x, _, residual, loss_scale, n, absmax, block, device):
    programs, tiling = _tiling("quant_absmax", n, block)
    _launch(device, quant_shared.quant_absmax, programs, x, residual, loss_scale, absmax, n, **tiling)


def quant_encode_shared(
    x, _, residual, loss_scale, n, absmax, codes, nbytes, levels, width, block, stochastic, seed, step, stream, device
):
    programs, tiling = _tiling("quant_encode_shared", n, block)
    draw = _draw(seed, step, stream)
    codes[triton.cdiv(n * width, 8) :].zero_()
    _launch(
        device, quant_shared.quant_encode_shared, programs, x, residual, loss_scale, absmax, _wide(codes, width), *draw, n,
        LEVELS=levels, BITS=width, STOCHASTIC=bool(stochastic), **tiling,
    )


def quant_decode_shared(out, _, weight, n, codes, absmax, rows, levels, width, block, stochastic, device):
    programs, tiling = _tiling("quant_decode_shared", n, block)
    _launch(
        device, quant_shared.quant_decode_shared, programs, out, weight, _wide(codes, width), absmax, rows, n,
        LEVELS=levels, BITS=width, STOCHASTIC=bool(stochastic), **tiling,
    )


def _wide(codes, width):
    return codes.view(torch.int16) if width == 16 else codes


def _ternary_tiling(n: int, block: int) -> tuple[int, dict[str, int]]:
    """As _tiling: five pieces to a block."""
    width = block // 5
    rows = _TILE // 2 // width
    return triton.cdiv(n, block * rows), {"BLOCK": block, "ROWS": rows, "WIDTH": width, "CHUNKS": 5}


def ternary_encode(x, _, residual, loss_scale, n, codes, scales, block, stochastic, seed, step, stream, device):
    programs, tiling = _ternary_tiling(n, block)
    draw = _draw(seed, step, stream)
    _launch(
        device, ternary.ternary_encode, programs, x, residual, loss_scale, codes, scales, *draw, n,
        STOCHASTIC=bool(stochastic), **tiling,
    )


def ternary_decode_sum(out, _, weight, n, rows, stride, codes, scales, block, device):
    programs, tiling = _ternary_tiling(n, block)
    strides = codes.stride(0), scales.stride(0)
    _launch(device, ternary.ternary_decode_sum, programs, out, weight, codes, scales, rows, *strides, n, **tiling)


def _sign_tiling(op: str, n: int, block: int) -> tuple[int, dict[str, int]]:
    """As _tiling: pieces of 128, the number of partial sums, of several blocks side by side."""
    _tiling(op, n, block)
    rows = 16
    return triton.cdiv(n, block * rows), {"BLOCK": block, "ROWS": rows, "WIDTH": 128, "CHUNKS": triton.cdiv(block, 128)}


def sign_encode(x, _, residual, loss_scale, n, signs, scales, block, device):
    programs, tiling = _sign_tiling("sign_encode", n, block)
    _launch(device, sign.sign_encode, programs, x, residual, loss_scale, signs, scales, n, **tiling)


def sign_decode_sum(out, _, weight, n, rows, stride, signs, scales, block, device):
    programs, tiling = _sign_tiling("sign_decode_sum", n, block)
    strides = signs.stride(0), scales.stride(0)
    _launch(device, sign.sign_decode_sum, programs, out, weight, signs, scales, rows, *strides, n, **tiling)


def sign_vote(n, rows, stride, row_signs, row_scales, signs, scales, block, device):
    programs, tiling = _sign_tiling("sign_vote", n, block)
    strides = row_signs.stride(0), row_scales.stride(0)
    _launch(device, sign.sign_vote, programs, row_signs, row_scales, rows, *strides, signs, scales, n, **tiling)


_STRETCHES = 16  # of 128 elements, to a program that rotates them


def hadamard_encode(x, _, residual, loss_scale, n, rotated, device):
    _launch(device, hadamard.hadamard_encode, triton.cdiv(n, 128 * _STRETCHES), x, residual, loss_scale, rotated, n, ROWS=_STRETCHES)


def hadamard_keep(x, _, residual, loss_scale, n, rotated, device):
    _launch(device, hadamard.hadamard_keep, triton.cdiv(n, 128 * _STRETCHES), x, residual, loss_scale, rotated, n, ROWS=_STRETCHES)


def hadamard_decode(out, _, weight, n, rotated, device):
    _launch(device, hadamard.hadamard_decode, triton.cdiv(n, 128 * _STRETCHES), out, weight, rotated, n, ROWS=_STRETCHES)


def topk_workspace(n: int, k: int) -> int:
    """Bytes of scratch for topk_encode: see kernels/topk.py. What is left in it is of no use to the next call."""
    return 8 * (topk.ABOVE.value + 2 * triton.cdiv(n, _TILE))


def topk_encode(x, _, residual, loss_scale, n, values, index, starts, k, workspace, nbytes, device):
    tiles = triton.cdiv(n, _TILE)
    programs = min(tiles, _PROGRAMS)
    given = x, residual, loss_scale
    work = workspace.view(torch.int64)
    work[: topk.COUNTERS.value].zero_()
    for digits in (0, 1, 2):
        _launch(device, topk.topk_histogram, programs, *given, work, k, n, tiles, DIGITS=digits, TILE=_TILE)
    _launch(device, topk.topk_count, programs, *given, work, k, n, tiles, TILE=_TILE)
    _launch(device, topk.topk_scan, min(tiles, 1), work, k, tiles, STEP=1024)
    _launch(device, topk.topk_emit, tiles, *given, values, index, starts, work, n, tiles, TILE=_TILE)


_SAMPLE = 65536  # elements that a first threshold is made from


def threshold_workspace(n: int, k: int) -> int:
    """Bytes of scratch for threshold_encode: see kernels/threshold.py. What is left in it is of no use to the next call."""
    return 8 * (threshold.HEAD.value + 2 * triton.cdiv(n, _TILE)) + 4 * min(n, _SAMPLE) + triton.cdiv(n, 8)


def threshold_encode(x, _, residual, loss_scale, n, values, index, starts, k, control, begin, workspace, nbytes, device):
    tiles, m = triton.cdiv(n, _TILE), min(n, _SAMPLE)
    given = x, residual, loss_scale
    sizes = 8 * threshold.HEAD.value, 16 * tiles, 4 * m, triton.cdiv(n, 8)
    head, counts, keys, mask = workspace.split(sizes)
    head, counts, keys = head.view(torch.int64).zero_(), counts.view(torch.int64), keys.view(torch.int32)
    rank = max(1, (k * m + n // 2) // n) if k else 0
    values.zero_()
    index.fill_((((n - 1) & 0xFFFF) ^ 0x8000) - 0x8000)
    _launch(device, threshold.threshold_sample, triton.cdiv(m, _TILE), *given, control, keys, n, m, TILE=_TILE)
    _launch(device, threshold.threshold_begin, min(tiles, 1), control, keys, head, rank, m, STEP=4096)
    _launch(device, threshold.threshold_select, tiles, *given, head, counts, mask, begin, n, tiles, TILE=_TILE)
    _launch(device, threshold.threshold_finish, min(tiles, 1), head, counts, control, k, tiles, STEP=1024)
    _launch(device, threshold.threshold_emit, tiles, *given, head, counts, mask, values, index, starts, begin, k, n, tiles, TILE=_TILE)


def topk_decode_sum(out, _, weight, n, rows, stride, place_stride, values, index, starts, k, device):
    total = out if out.dtype == torch.float32 else torch.empty(n, dtype=torch.float32, device=device)
    strides = values.stride(0), index.stride(0), starts.stride(0)
    tiles = starts.shape[1]
    _launch(
        device, topk.topk_decode_sum, tiles, out, total, weight, values, index, starts, rows, *strides, k, n, tiles,
        STEP=2048, num_warps=16,
    )


def sparse_add(residual, loss_scale, n, values, index, starts, k, device):
    tiles = starts.shape[0]
    given = residual, loss_scale, values, index, starts
    _launch(device, topk.sparse_add, tiles, *given, k, n, tiles, STEP=2048, num_warps=16)


def _blocks(n: int, k: int, count: int) -> tuple[int, dict[str, int]]:
    """Programs for all blocks, the last one among them, and the constants of the kernels that read their entries."""
    longest = max(k, count - n // blocktopk.BLOCK.value * k, 2)
    return triton.cdiv(n, 4 * blocktopk.BLOCK.value), {"ROWS": 4, "WIDTH": triton.next_power_of_2(longest)}


def blocktopk_encode(x, _, residual, loss_scale, n, values, index, count, k, device):
    _launch(device, blocktopk.blocktopk_encode, _blocks(n, k, count)[0], x, residual, loss_scale, values, index, k, count, n, ROWS=4)


def blocktopk_decode_sum(out, _, weight, n, rows, stride, place_stride, values, index, count, k, device):
    total = out if out.dtype == torch.float32 else torch.empty(n, dtype=torch.float32, device=device)
    programs, constants = _blocks(n, k, count)
    strides = values.stride(0), index.stride(0)
    _launch(device, blocktopk.blocktopk_decode_sum, programs, out, total, weight, values, index, rows, *strides, k, count, n, **constants)


def blocktopk_add(residual, loss_scale, n, values, index, count, k, device):
    programs, constants = _blocks(n, k, count)
    _launch(device, blocktopk.blocktopk_add, programs, residual, loss_scale, values, index, k, count, n, **constants)


def bits_pack(index, packed, count, width, device):
    _launch(device, bits.bits_pack, triton.cdiv(packed.numel(), _TILE), index, packed, count, WIDTH=width, TILE=_TILE)


def bits_unpack(packed, index, count, width, device):
    _launch(device, bits.bits_unpack, triton.cdiv(count, _TILE), packed, index, count, WIDTH=width, TILE=_TILE)


def eliasfano_pack(index, starts, high, n, k, bits, device):
    words = torch.zeros(triton.cdiv(high.numel(), 4), dtype=torch.int32, device=device)
    tiles = starts.shape[0]
    _launch(device, eliasfano.eliasfano_pack, tiles, index, starts, words, k, tiles, BITS=bits, STEP=2048)
    high.copy_(words.view(torch.uint8)[: high.numel()])


def eliasfano_unpack(high, index, starts, n, k, bits, device):
    length = k + (n >> bits)
    chunks = triton.cdiv(length + k, _TILE)
    ones = torch.empty(chunks, dtype=torch.int64, device=device)
    _launch(device, eliasfano.eliasfano_count, chunks, high, ones, length, TILE=_TILE)
    before = torch.cumsum(ones, 0) - ones
    starts.fill_(k)
    starts[:1].zero_()
    _launch(device, eliasfano.eliasfano_unpack, chunks, high, before, index, starts, length, k, starts.shape[0], BITS=bits, TILE=_TILE)


def _strata(n: int, k: int) -> tuple[int, int, dict[str, int]]:
    """Programs, pieces of a stratum, and constants."""
    longest = max(1, triton.cdiv(n, max(k, 1)))
    width = min(triton.next_power_of_2(longest), _TILE)
    rows = min(_TILE // width, 256)
    return triton.cdiv(k, rows), triton.cdiv(longest, width), {"ROWS": rows, "WIDTH": width}


def randomk_encode(x, _, residual, loss_scale, n, values, k, scaled, seed, step, stream, device):
    programs, chunks, constants = _strata(n, k)
    draw = _draw(seed, step, stream)
    _launch(device, randomk.randomk_encode, programs, x, residual, loss_scale, values, *draw, k, *divmod(n, max(k, 1)), chunks, SCALED=bool(scaled), **constants)


def randomk_decode_sum(out, _, weight, n, rows, stride, values, k, seed, step, stream, device):
    programs, chunks, constants = _strata(n, k)
    draw = _draw(seed, step, stream)
    _launch(device, randomk.randomk_decode_sum, programs, out, weight, values, *draw, rows, values.stride(0), k, *divmod(n, max(k, 1)), chunks, **constants)


_LAUNCHERS = {name: f for name, f in globals().items() if getattr(f, "__module__", "") == __name__ and name[0] != "_"}
_DEVICE = "cpu" if _INTERPRETED else "cuda"
globals().update(bind(SimpleNamespace(**_LAUNCHERS), _DEVICE, lambda device: device, addresses=False))
