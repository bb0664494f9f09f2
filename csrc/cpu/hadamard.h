// The Walsh-Hadamard rotation of stretches of 128 elements, each in registers.
#pragma once
#include "../codec/hadamard.h"
#include "half.h"
#include "values.h"

namespace {

using commopt::HadamardDecode;
using commopt::HadamardEncode;
using commopt::HadamardKeep;
using commopt::kStretch;

#if defined(__AVX512F__)
constexpr int kWide = 16;
#define COMMOPT_EACH(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#elif defined(__AVX2__)
constexpr int kWide = 8;
#define COMMOPT_EACH(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#else
constexpr int kWide = 4;
#define COMMOPT_EACH(f) f(0), f(1), f(2), f(3)
#endif
typedef float Wide __attribute__((vector_size(4 * kWide)));
typedef uint32_t WideBits __attribute__((vector_size(4 * kWide)));
constexpr int kWides = kStretch / kWide;

// Both partners of a pair sit in one vector: a + b in the place of a, a - b in that of b.
template <int kApart> CODEC void within(Wide (&v)[kWides]) {
#define COMMOPT_PARTNER(i) ((i) ^ kApart)
#define COMMOPT_MINUS(i) ((i)&kApart ? 0x80000000u : 0u)
  const WideBits partner = {COMMOPT_EACH(COMMOPT_PARTNER)}, minus = {COMMOPT_EACH(COMMOPT_MINUS)};
#undef COMMOPT_PARTNER
#undef COMMOPT_MINUS
  for (int j = 0; j < kWides; ++j) v[j] = __builtin_shuffle(v[j], partner) + (Wide)((WideBits)v[j] ^ minus);
}

// 2^-3.5 times the butterfly of a stretch.
CODEC void rotate(float (&stretch)[kStretch]) {
  Wide v[kWides];
  memcpy(v, stretch, sizeof(v));
  for (int j = 0; j < kWides; ++j) v[j] *= kRoot;
  within<1>(v);
  within<2>(v);
  if (kWide > 4) within<4 % kWide>(v);
  if (kWide > 8) within<8 % kWide>(v);
#pragma GCC unroll 8
  for (int apart = 1; apart < kWides; apart *= 2)
#pragma GCC unroll 32
    for (int j = 0; j < kWides; ++j)
      if (!(j & apart)) {
        const Wide a = v[j], b = v[j + apart];
        v[j] = a + b;
        v[j + apart] = a - b;
      }
  memcpy(stretch, v, sizeof(v));
}

struct Flips {
  uint32_t bits[kStretch];
  constexpr Flips() : bits() {
    for (int i = 0; i < kStretch; ++i) bits[i] = flip_of(i);
  }
};
constexpr Flips kFlips;
CODEC float flipped(float x, int64_t i) { return float_of(bits_of(x) ^ kFlips.bits[i]); }

// body(at, count, whole) for the stretches of [begin, end): count and whole are constants but in a last, shorter one.
template <class Body> CODEC void stretches(int64_t begin, int64_t end, Body body) {
  for (; begin + kStretch <= end; begin += kStretch) body(begin, kStretch, true);
  if (begin < end) body(begin, end - begin, false);
}

// D H of the rotated elements.
CODEC void rotated_back(const float* __restrict rotated, int64_t count, bool whole, float (&value)[kStretch]) {
  memcpy(value, rotated, (size_t)count * 4);
  if (!whole) return;
  rotate(value);
  for (int64_t i = 0; i < kStretch; ++i) value[i] = flipped(value[i], i);
}

template <class X, bool kResidual> void hadamard_encode_loop(const HadamardEncode& op, int64_t begin, int64_t end) {
  const typename X::Stored* __restrict x = (const typename X::Stored*)op.in.x;
  const float* __restrict residual = op.in.residual;
  const float scale = *op.in.loss_scale;
  stretches(begin, end, [&](int64_t at, int64_t count, bool whole) __attribute__((always_inline)) {
    alignas(64) float value[kStretch];
    prefetch(x + at, count);
    if (kResidual) prefetch(residual + at, count);
    for (int64_t i = 0; i < count; ++i) {
      const float acc = acc_of<X, kResidual>(x[at + i], residual, at + i, scale);
      value[i] = whole ? flipped(acc, i) : acc;
    }
    if (whole) rotate(value);
    memcpy(op.rotated + at, value, (size_t)count * 4);
  });
}

void hadamard_encode(const HadamardEncode& op, int64_t begin, int64_t end) {
  with_dtype(op.in.dtype, [&](auto x) {
    with_flag(op.in.residual != nullptr, [&](auto residual) { hadamard_encode_loop<decltype(x), decltype(residual)::value>(op, begin, end); });
  });
}

void hadamard_keep(const HadamardKeep& op, int64_t begin, int64_t end) {
  with_dtype(op.in.dtype, [&](auto format) {
    using X = decltype(format);
    const typename X::Stored* __restrict x = (const typename X::Stored*)op.in.x;
    float* __restrict residual = op.in.residual;
    const float scale = *op.in.loss_scale, unscale = divide(1.0f, scale);
    stretches(begin, end, [&](int64_t at, int64_t count, bool whole) __attribute__((always_inline)) {
      alignas(64) float sent[kStretch];
      rotated_back(op.rotated + at, count, whole, sent);
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        const float old = residual[at + i], kept = mul(sub(acc_of<X, true>(x[at + i], residual, at + i, scale), sent[i]), unscale);
        residual[at + i] = magnitude(sent[i]) < kNonFinite ? kept : old;
      }
    });
  });
}

void hadamard_decode(const HadamardDecode& op, int64_t begin, int64_t end) {
  with_dtype(op.dtype, [&](auto format) {
    using Out = decltype(format);
    typename Out::Stored* __restrict out = (typename Out::Stored*)op.out;
    stretches(begin, end, [&](int64_t at, int64_t count, bool whole) __attribute__((always_inline)) {
      alignas(64) float value[kStretch];
      rotated_back(op.rotated + at, count, whole, value);
      for (int64_t i = 0; i < count; ++i) out[at + i] = Out::store(mul(value[i], op.weight));
    });
  });
}

}  // namespace
