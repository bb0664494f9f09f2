// The sign of each value and the mean magnitude of its block.
#pragma once
#include "../codec/sign.h"
#include "half.h"
#include "values.h"

namespace {

using commopt::SignDecodeSum;
using commopt::SignEncode;
using commopt::SignVote;

// The sum of the magnitudes of a block, in the order that all backends add in.
template <class X, bool kResidual>
CODEC float magnitudes(const typename X::Stored* __restrict x, const float* __restrict residual, float scale, int64_t begin, int64_t end) {
  alignas(64) float partial[kPartials] = {};
  int64_t at = begin;
  auto some = [&](int64_t count) __attribute__((always_inline)) {
    prefetch_far<kEvenLines>(x + at, count, kAhead / 2);
    if (kResidual) prefetch_far<kEvenLines>(residual + at, count, kAhead / 2);
    for (int64_t i = 0; i < count; ++i) partial[i] = add(partial[i], float_of(magnitude(acc_of<X, kResidual>(x[at + i], residual, at + i, scale))));
  };
  for (; at + kPartials <= end; at += kPartials) some(kPartials);
  if (at < end) some(end - at);
  for (int half = kPartials / 2; half >= 8; half /= 2)
    for (int i = 0; i < half; ++i) partial[i] = add(partial[i], partial[i + half]);
  for (int half = 4; half; half /= 2)
    for (int i = 0; i < half; ++i) partial[i] = add(partial[i], partial[i + half]);
  return partial[0];
}

// Bit i: whether value i of a strip is below zero.
CODEC uint64_t negatives(const float* acc) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < kStrip; i += 16) bits |= (uint64_t)_mm512_cmp_ps_mask(_mm512_load_ps(acc + i), _mm512_setzero_ps(), _CMP_LT_OQ) << i;
#elif defined(__AVX2__)
  for (int i = 0; i < kStrip; i += 8) bits |= (uint64_t)(uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_load_ps(acc + i), _mm256_setzero_ps(), _CMP_LT_OQ)) << i;
#else
  for (int i = 0; i < kStrip; i += 4) bits |= (uint64_t)(uint32_t)_mm_movemask_ps(_mm_cmplt_ps(_mm_load_ps(acc + i), _mm_setzero_ps())) << i;
#endif
  return bits;
}

template <class X, bool kResidual> void sign_encode_loop(const SignEncode& op, int64_t begin, int64_t end) {
  const typename X::Stored* __restrict x = (const typename X::Stored*)op.in.x;
  float* __restrict residual = op.in.residual;
  uint8_t* __restrict signs = op.signs;
  const float scale = *op.in.loss_scale, unscale = divide(1.0f, scale);
  for (int64_t first = begin; first < end; first += op.block) {
    const int64_t stop = least(first + op.block, end);
    const float sum = magnitudes<X, kResidual>(x, residual, scale, first, stop);
    // A sum that is not finite is that of a value which is not, or has overflowed.
    const bool usable = bits_of(sum) < kNonFinite || absmax_of<X, kResidual>(x, residual, scale, first, stop) < kNonFinite;
    if (!usable) {
      op.scales[first / op.block] = float_of(kNaN);
      memset(signs + first / 8, 0, (size_t)(stop - first + 7) / 8);
      continue;
    }
    const float mean = mean_of(sum, (int)(stop - first));
    op.scales[first / op.block] = mean;
    strips(first, stop, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
      prefetch_far<kOddLines>(x + at, count);
      if (kResidual) prefetch_far<kOddLines>(residual + at, count);
      alignas(64) float acc[kStrip];
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        acc[i] = acc_of<X, kResidual>(x[at + i], residual, at + i, scale);
        const float sent = acc[i] < 0.0f ? -mean : mean;
        if (kResidual) residual[at + i] = mul(sub(acc[i], sent), unscale);
      }
      for (int64_t i = count; i < kStrip; ++i) acc[i] = 0.0f;
      const uint64_t bits = negatives(acc);
      memcpy(signs + at / 8, &bits, (size_t)(count + 7) / 8);
    });
  }
}

void sign_encode(const SignEncode& op, int64_t begin, int64_t end) {
  with_dtype(op.in.dtype, [&](auto x) {
    with_flag(op.in.residual != nullptr, [&](auto residual) { sign_encode_loop<decltype(x), decltype(residual)::value>(op, begin, end); });
  });
}

struct BitTable {
  uint32_t bit[32];
  constexpr BitTable() : bit() {
    for (int i = 0; i < 32; ++i) bit[i] = 1u << i;
  }
};
constexpr BitTable kBit;

// sum[0 .. count - 1] <- the decoded signs of one block, or += where they are not the first.
template <bool kFirst> CODEC void sign_run(const uint8_t* signs, float scale, int64_t count, float* __restrict sum) {
  uint32_t words[kStrip / 32] = {};
  memcpy(words, signs, (size_t)(count + 7) / 8);
  for (int64_t at = 0; at < count; at += 32)
    for (int64_t i = 0; i < least(32, count - at); ++i) {
      const float value = words[at / 32] & kBit.bit[i] ? -scale : scale;
      sum[at + i] = kFirst ? value : add(sum[at + i], value);
    }
}

template <class Out> void sign_decode_loop(const SignDecodeSum& op, int64_t begin, int64_t end) {
  typename Out::Stored* __restrict out = (typename Out::Stored*)op.out.out;
  for (int64_t block = begin / op.block; block * op.block < end; ++block) {
    strips(block * op.block, least(end, (block + 1) * op.block), [&](int64_t at, int64_t count) __attribute__((always_inline)) {
      alignas(64) float sum[kStrip];
      for (int64_t w = 0; w < op.out.rows; ++w) {
        const float scale = row(op.scales, op.out.stride, w)[block];
        const uint8_t* signs = row(op.signs, op.out.stride, w) + at / 8;
        prefetch(signs, 1, kAhead / 8);
        if (w == 0) sign_run<true>(signs, scale, count, sum);
        else sign_run<false>(signs, scale, count, sum);
      }
      for (int64_t i = 0; i < count; ++i) out[at + i] = Out::store(mul(sum[i], op.out.weight));
    });
  }
}

void sign_decode_sum(const SignDecodeSum& op, int64_t begin, int64_t end) {
  with_dtype(op.out.dtype, [&](auto out) { sign_decode_loop<decltype(out)>(op, begin, end); });
}

// Which of a strip's elements are negative in more than half of the rows, or in half of them and in the sum: bit i for element i.
// The rows are counted for all elements at once: bit i of plane p is bit p of the count of element i.
CODEC uint64_t voted(const SignDecodeSum& op, int64_t block, int64_t at, int64_t count) {
  uint64_t planes[64] = {};
  alignas(64) float sum[kStrip] = {};
  const bool even = op.out.rows % 2 == 0;
  for (int64_t w = 0; w < op.out.rows; ++w) {
    const uint8_t* signs = row(op.signs, op.out.stride, w) + at / 8;
    prefetch(signs, 1, kAhead / 8);
    uint64_t carry = 0;
    memcpy(&carry, signs, (size_t)(count + 7) / 8);
    for (int p = 0; carry; ++p) {
      const uint64_t both = planes[p] & carry;
      planes[p] ^= carry;
      carry = both;
    }
    if (!even) continue;  // there are no ties
    const float scale = row(op.scales, op.out.stride, w)[block];
    if (w == 0) sign_run<true>(signs, scale, count, sum);
    else sign_run<false>(signs, scale, count, sum);
  }
  uint64_t more = 0, equal = count < 64 ? (1ull << count) - 1 : ~0ull;  // than half of the rows, by the planes so far
  for (int p = 63 - __builtin_clzll((uint64_t)op.out.rows); p >= 0; --p) {
    if (op.out.rows >> (p + 1) & 1) {
      equal &= planes[p];
    } else {
      more |= equal & planes[p];
      equal &= ~planes[p];
    }
  }
  return even ? more | (equal & negatives(sum)) : more;
}

void sign_vote(const SignVote& op, int64_t begin, int64_t end) {
  for (int64_t block = begin / op.from.block; block * op.from.block < end; ++block) {
    float total = op.from.scales[block];
    bool usable = magnitude(total) < kNonFinite;
    for (int64_t w = 1; w < op.from.out.rows; ++w) {
      const float scale = row(op.from.scales, op.from.out.stride, w)[block];
      usable = usable & (magnitude(scale) < kNonFinite);
      total = add(total, scale);
    }
    op.scales[block] = usable ? finite_of(total) : float_of(kNaN);
    strips(block * op.from.block, least(end, (block + 1) * op.from.block), [&](int64_t at, int64_t count) __attribute__((always_inline)) {
      const uint64_t bits = usable ? voted(op.from, block, at, count) : 0;
      memcpy(op.signs + at / 8, &bits, (size_t)(count + 7) / 8);
    });
  }
}

}  // namespace
