// float16 with a power of two per block.
#pragma once
#include "../codec/quantize.h"
#include "values.h"

namespace {

using commopt::HalfDecodeSum;
using commopt::HalfEncode;

// x + residual * loss_scale.
template <class X, bool kResidual> CODEC float acc_of(typename X::Stored x, const float* residual, int64_t i, float scale) {
  return kResidual ? accumulate(X::load(x), residual[i], scale) : X::load(x);
}

// The largest magnitude of a block, by lanes, so that the order of the loop is also that of the vectors.
template <class X, bool kResidual, Lines kLines = kEvenLines>
CODEC uint32_t absmax_of(const typename X::Stored* __restrict x, const float* __restrict residual, float scale, int64_t begin, int64_t end) {
  uint32_t lanes[kStrip] = {}, most = 0;
  strips(begin, end, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
    prefetch_far<kLines>(x + at, count, kAhead * 3 / 4);
    if (kResidual) prefetch_far<kLines>(residual + at, count, kAhead * 3 / 4);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t m = magnitude(acc_of<X, kResidual>(x[at + i], residual, at + i, scale));
      lanes[i] = m > lanes[i] ? m : lanes[i];
    }
  });
  for (int64_t i = 0; i < kStrip; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

template <class X, bool kResidual>
void half_encode_loop(const HalfEncode& op, int64_t begin, int64_t end) {
  const typename X::Stored* __restrict x = (const typename X::Stored*)op.in.x;
  float* __restrict residual = op.in.residual;
  uint16_t* __restrict values = op.values;
  const float scale = *op.in.loss_scale, unscale = divide(1.0f, scale);
  for (int64_t first = begin; first < end; first += op.block) {
    const int64_t stop = least(first + op.block, end);
    const uint32_t absmax = absmax_of<X, kResidual>(x, residual, scale, first, stop);
    const BlockScale shared = power_scale(absmax);
    op.scales[first / op.block] = shared.scale;
    if (absmax >= kNonFinite) {
      memset(values + first, 0, (size_t)(stop - first) * 2);
      continue;
    }
    strips(first, stop, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
      prefetch_far<kOddLines>(x + at, count);
      if (kResidual) prefetch_far<kOddLines>(residual + at, count);
      for (int64_t i = at; i < at + count; ++i) {
        float acc = acc_of<X, kResidual>(x[i], residual, i, scale);
        uint16_t value = to_fp16(mul(acc, shared.inverse));
        values[i] = value;
        if (kResidual) residual[i] = mul(sub(acc, mul(from_fp16(value), shared.scale)), unscale);
      }
    });
  }
}

void half_encode(const HalfEncode& op, int64_t begin, int64_t end) {
  with_dtype(op.in.dtype, [&](auto x) {
    with_flag(op.in.residual != nullptr, [&](auto residual) { half_encode_loop<decltype(x), decltype(residual)::value>(op, begin, end); });
  });
}

template <class Out> void half_decode_loop(const HalfDecodeSum& op, int64_t begin, int64_t end) {
  typename Out::Stored* __restrict out = (typename Out::Stored*)op.out.out;
  float sum[256];
  for (int64_t block = begin / op.block; block * op.block < end; ++block) {
    const int64_t stop = least(end, (block + 1) * op.block);
    for (int64_t at = block * op.block; at < stop; at += 256) {
      const int64_t count = least(256, stop - at);
      for (int64_t w = 0; w < op.out.rows; ++w) {
        const uint16_t* __restrict v = row(op.values, op.out.stride, w) + at;
        const float scale = row(op.scales, op.out.stride, w)[block];
        prefetch(v, count);
        if (w == 0)
          for (int64_t i = 0; i < count; ++i) sum[i] = mul(from_fp16(v[i]), scale);
        else
          for (int64_t i = 0; i < count; ++i) sum[i] = add(sum[i], mul(from_fp16(v[i]), scale));
      }
      for (int64_t i = 0; i < count; ++i) out[at + i] = Out::store(mul(sum[i], op.out.weight));
    }
  }
}

void half_decode_sum(const HalfDecodeSum& op, int64_t begin, int64_t end) {
  with_dtype(op.out.dtype, [&](auto out) { half_decode_loop<decltype(out)>(op, begin, end); });
}

}  // namespace
