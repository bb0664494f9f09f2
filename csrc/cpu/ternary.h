// One of three values each, five to a byte.
#pragma once
#include "../codec/ternary.h"
#include "quant.h"

namespace {

using commopt::TernaryDecodeSum;
using commopt::TernaryEncode;

constexpr int kLongest = kDigits * 256;  // elements of a block

template <class X, bool kResidual, bool kStochastic>
void ternary_encode_loop(const TernaryEncode& op, int64_t begin, int64_t end) {
  constexpr int steps = steps_of(1, kStochastic);
  const int m = op.block / kDigits;
  const typename X::Stored* x = (const typename X::Stored*)op.in.x;
  const float scale = *op.in.loss_scale, unscale = divide(1.0f, scale);
  const Drawer draw(op, begin);
  float* scales = op.scales + begin / op.block;
  uint8_t* __restrict codes = op.codes + begin / kDigits;
  alignas(64) uint8_t digits[kLongest];
  block_by_block<X, kResidual>(op.in, op.block, begin, end, [&](int64_t first, int64_t stop, uint32_t absmax) __attribute__((always_inline)) {
    const BlockScale shared = block_scale(absmax, steps);
    *scales++ = shared.scale;
    const bool usable = absmax < kNonFinite;
    if (!usable || stop - first < op.block) memset(digits, 1, (size_t)op.block);
    for (int64_t at = first; usable && at < stop; at += kDrawn)
      quantize_run<X, kResidual, kStochastic, steps != 1>(x + at, op.in.residual + at, draw, shared, 1, 1, scale, unscale, at,
                                                          least(kDrawn, stop - at), digits + (at - first));
    for (int j = 0; j < m; j += 8)
#pragma GCC ivdep
      for (int i = j; i < j + 8; ++i)
        codes[i] = (uint8_t)(digits[i] + 3 * (digits[i + m] + 3 * (digits[i + 2 * m] + 3 * (digits[i + 3 * m] + 3 * digits[i + 4 * m]))));
    codes += m;
  });
}

void ternary_encode(const TernaryEncode& op, int64_t begin, int64_t end) {
  with_dtype(op.in.dtype, [&](auto x) {
    with_flag(op.in.residual != nullptr, [&](auto residual) {
      with_flag(op.stochastic, [&](auto stochastic) {
        ternary_encode_loop<decltype(x), decltype(residual)::value, decltype(stochastic)::value>(op, begin, end);
      });
    });
  });
}

// The digits of a block as codes from -1 on, a byte each.
CODEC void ternary_digits(const uint8_t* __restrict codes, int m, int8_t* __restrict q) {
  strips(0, m, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
#pragma GCC ivdep
    for (int64_t i = at; i < at + count; ++i) {
      uint16_t rest = codes[i];
      for (int digit = 0; digit < kDigits - 1; ++digit) {
        const uint16_t quotient = third(rest);
        q[i + digit * m] = (int8_t)(rest - 3 * quotient - 1);
        rest = quotient;
      }
      q[i + (kDigits - 1) * m] = (int8_t)(rest - 1);
    }
  });
}

template <class Out> void ternary_decode_loop(const TernaryDecodeSum& op, int64_t begin, int64_t end) {
  typename Out::Stored* __restrict out = (typename Out::Stored*)op.out.out;
  const int m = op.block / kDigits;
  alignas(64) float sum[kLongest];
  alignas(64) int8_t q[kLongest];
  for (int64_t block = begin / op.block; block * op.block < end; ++block) {
    const int64_t first = block * op.block, count = least(end - first, op.block);
    for (int64_t w = 0; w < op.out.rows; ++w) {
      const float scale = row(op.scales, op.out.stride, w)[block];
      const uint8_t* codes = row(op.codes, op.out.stride, w) + block * m;
      prefetch(codes, m, kAhead / 4);
      ternary_digits(codes, m, q);
      strips(0, op.block, [&](int64_t at, int64_t strip) __attribute__((always_inline)) {
        if (w == 0) dequantize_run<8, true>((const uint8_t*)q + at, scale, strip, sum + at);
        else dequantize_run<8, false>((const uint8_t*)q + at, scale, strip, sum + at);
      });
    }
    strips(0, count, [&](int64_t at, int64_t strip) __attribute__((always_inline)) {
      for (int64_t i = at; i < at + strip; ++i) out[first + i] = Out::store(mul(sum[i], op.out.weight));
    });
  }
}

void ternary_decode_sum(const TernaryDecodeSum& op, int64_t begin, int64_t end) {
  with_dtype(op.out.dtype, [&](auto out) { ternary_decode_loop<decltype(out)>(op, begin, end); });
}

}  // namespace
