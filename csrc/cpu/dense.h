// Every value, as float32 or bfloat16.
#pragma once
#include "values.h"

namespace {

using commopt::DenseDecodeSum;
using commopt::DenseEncode;

template <class X, class V, bool kResidual>
void dense_encode_loop(const DenseEncode& op, int64_t begin, int64_t end) {
  const typename X::Stored* __restrict x = (const typename X::Stored*)op.in.x;
  typename V::Stored* __restrict values = (typename V::Stored*)op.values;
  float* __restrict residual = op.in.residual;
  const float scale = *op.in.loss_scale, inverse = divide(1.0f, scale);
  for (int64_t i = begin; i < end; ++i) {
    float acc = kResidual ? accumulate(X::load(x[i]), residual[i], scale) : X::load(x[i]);
    typename V::Stored value = V::store(canonical(acc));
    values[i] = value;
    if (kResidual) {
      float sent = V::load(value), kept = mul(sub(acc, sent), inverse);
      residual[i] = magnitude(sent) < kNonFinite ? kept : residual[i];
    }
  }
}

void dense_encode(const DenseEncode& op, int64_t begin, int64_t end) {
  with_dtype(op.in.dtype, [&](auto x) {
    with_flag(op.in.residual != nullptr, [&](auto residual) {
      if (op.values_dtype == commopt::kFloat32) dense_encode_loop<decltype(x), F32, decltype(residual)::value>(op, begin, end);
      else dense_encode_loop<decltype(x), BF16, decltype(residual)::value>(op, begin, end);
    });
  });
}

// Sums stay in a small buffer, so that `out` is written once and each row is read in long runs.
constexpr int64_t kRun = 1024;

template <class Out, class V> void dense_decode_loop(const DenseDecodeSum& op, int64_t begin, int64_t end) {
  typename Out::Stored* __restrict out = (typename Out::Stored*)op.out.out;
  float sum[kRun];
  for (int64_t at = begin; at < end; at += kRun) {
    const int64_t count = least(kRun, end - at);
    for (int64_t w = 0; w < op.out.rows; ++w) {
      const typename V::Stored* __restrict v = row((const typename V::Stored*)op.values, op.out.stride, w) + at;
      prefetch(v, count);
      if (w == 0)
        for (int64_t i = 0; i < count; ++i) sum[i] = V::load(v[i]);
      else
        for (int64_t i = 0; i < count; ++i) sum[i] = add(sum[i], V::load(v[i]));
    }
    for (int64_t i = 0; i < count; ++i) out[at + i] = Out::store(mul(sum[i], op.out.weight));
  }
}

void dense_decode_sum(const DenseDecodeSum& op, int64_t begin, int64_t end) {
  with_dtype(op.out.dtype, [&](auto out) {
    if (op.values_dtype == commopt::kFloat32) dense_decode_loop<decltype(out), F32>(op, begin, end);
    else dense_decode_loop<decltype(out), BF16>(op, begin, end);
  });
}

// What the benches compare with: the least that error feedback can do to memory, prefetched from where that serves it best.
void axpy(float* __restrict r, const float* __restrict g, float s, int64_t begin, int64_t end) {
  strips(begin, end, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
    prefetch_far(r + at, count, kAhead / 2);
    prefetch_far(g + at, count, kAhead / 2);
#pragma GCC ivdep
    for (int64_t i = at; i < at + count; ++i) r[i] = r[i] + g[i] * s;
  });
}

}  // namespace
