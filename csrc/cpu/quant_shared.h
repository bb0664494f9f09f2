// Integer codes with a scale that all ranks share, so that sums of codes are codes of sums.
#pragma once
#include "quant.h"

namespace {

using commopt::QuantAbsMax;
using commopt::QuantDecodeShared;
using commopt::QuantEncodeShared;

template <class X, bool kResidual> void quant_absmax_loop(const QuantAbsMax& op, int64_t begin, int64_t end) {
  const typename X::Stored* x = (const typename X::Stored*)op.in.x;
  for (int64_t first = begin; first < end; first += op.block) {
    const uint32_t most = absmax_of<X, kResidual, kEveryLine>(x, op.in.residual, *op.in.loss_scale, first, least(first + op.block, end));
    op.absmax[first / op.block] = most > kNonFinite ? kNaN : most;
  }
}

void quant_absmax(const QuantAbsMax& op, int64_t begin, int64_t end) {
  with_dtype(op.in.dtype, [&](auto x) {
    with_flag(op.in.residual != nullptr, [&](auto residual) { quant_absmax_loop<decltype(x), decltype(residual)::value>(op, begin, end); });
  });
}

// to <- the codes in `width` bits each. q has room for one more, which fills up the last byte.
void put_codes(uint8_t* __restrict q, int64_t count, int width, uint8_t* __restrict to) {
  if (width == 8) memcpy(to, q, (size_t)count);
  if (width == 4) {
    q[count] = 0;
    pack<4>(q, (count + 1) / 2, to);
  }
  if (width == 16)
    strips(0, count, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
      uint16_t wide[kStrip];
      for (int64_t i = 0; i < count; ++i) wide[i] = q[at + i];
      memcpy(to + 2 * at, wide, (size_t)count * 2);
    });
}

// Levels and width are no parameters of the template, which has instances enough: codes are made as bytes and then put in place.
template <class X, bool kResidual, bool kStochastic>
void quant_encode_shared_loop(const QuantEncodeShared& op, int64_t begin, int64_t end) {
  const typename X::Stored* x = (const typename X::Stored*)op.in.x;
  const float scale = *op.in.loss_scale, unscale = divide(1.0f, scale);
  const Drawer draw(op, begin);
  for (int64_t first = begin; first < end; first += op.block) {
    const int64_t stop = least(first + op.block, end);
    const uint32_t absmax = op.absmax[first / op.block];
    const BlockScale shared = block_scale(absmax, (float)steps_of(op.levels, kStochastic));
    for (int64_t at = first; at < stop; at += kDrawn) {
      const int64_t count = least(kDrawn, stop - at);
      alignas(64) uint8_t q[kDrawn + 64];
      if (absmax < kNonFinite)
        quantize_run<X, kResidual, kStochastic, true>(x + at, op.in.residual + at, draw, shared, op.levels, op.levels, scale, unscale, at, count, q);
      else
        memset(q, op.levels, (size_t)count);
      put_codes(q, count, op.width, op.codes + at * op.width / 8);
    }
  }
}

void quant_encode_shared(const QuantEncodeShared& op, int64_t begin, int64_t end) {
  with_dtype(op.in.dtype, [&](auto x) {
    with_flag(op.in.residual != nullptr, [&](auto residual) {
      with_flag(op.stochastic, [&](auto stochastic) {
        quant_encode_shared_loop<decltype(x), decltype(residual)::value, decltype(stochastic)::value>(op, begin, end);
      });
    });
  });
}

// codes <- `count` of them, of a strip.
CODEC void get_codes(const uint8_t* from, int64_t count, int width, uint16_t* codes) {
  if (width == 16) {
    memcpy(codes, from, (size_t)count * 2);
  } else if (width == 8) {
    for (int64_t i = 0; i < count; ++i) codes[i] = from[i];
  } else {
    for (int64_t j = 0; j < (count + 1) / 2; ++j) {
      const uint32_t pair = (from[j] | (uint32_t)from[j] << 12) & 0x000f000fu;
      memcpy(codes + 2 * j, &pair, 4);
    }
  }
}

template <class Out> void quant_decode_shared_loop(const QuantDecodeShared& op, int64_t begin, int64_t end) {
  typename Out::Stored* __restrict out = (typename Out::Stored*)op.out.out;
  const int zero = (int)op.out.rows * op.levels;
  for (int64_t first = begin; first < end; first += op.block) {
    const float scale = block_scale(op.absmax[first / op.block], (float)steps_of(op.levels, op.stochastic)).scale;
    strips(first, least(first + op.block, end), [&](int64_t at, int64_t count) __attribute__((always_inline)) {
      alignas(64) uint16_t codes[kStrip];
      const uint8_t* from = op.codes + at * op.width / 8;
      prefetch_far(from, 1);
      get_codes(from, count, op.width, codes);
      for (int64_t i = 0; i < count; ++i) out[at + i] = Out::store(mul(dequantize((float)(codes[i] - zero), scale), op.out.weight));
    });
  }
}

void quant_decode_shared(const QuantDecodeShared& op, int64_t begin, int64_t end) {
  with_dtype(op.out.dtype, [&](auto out) { quant_decode_shared_loop<decltype(out)>(op, begin, end); });
}

}  // namespace
