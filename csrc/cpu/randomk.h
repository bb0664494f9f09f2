// One element, drawn at random, of each of k strata of neighbours.
#pragma once
#include "../codec/philox.h"
#include "half.h"
#include "values.h"

namespace {

using commopt::RandomkDecodeSum;
using commopt::RandomkEncode;

// The strata of n elements, of which the first n % k have one more than the others, and the element that each draws.
struct Strata {
  int64_t n, k, size, longer;
  uint64_t seed;
  uint32_t step, stream;
  Philox4 four = {};
  int64_t drawn = -1;  // four strata have their numbers in `four`

  template <class Op> Strata(const Op& op, int64_t n) : n(n), k(op.k), size(n / op.k), longer(n % op.k), seed(op.seed), step(op.step), stream(op.stream) {}

  CODEC int64_t begin(int64_t s) const { return s * size + least(s, longer); }
  // The first stratum that begins at `at` or after it.
  int64_t from(int64_t at) const {
    const int64_t before = longer * (size + 1), up = at + size;
    return at <= before ? (up) / (size + 1) : longer + (at - before + size - 1) / size;
  }
  CODEC int64_t element(int64_t s, int64_t first, int64_t stop) {
    if (s / 4 != drawn) drawn = s / 4, four = philox(seed, step, stream, (uint64_t)drawn);
    return first + (int64_t)((uint64_t)four.word[s % 4] * (uint64_t)(stop - first) >> 32);
  }
};

template <class X, bool kResidual> void randomk_encode_loop(const RandomkEncode& op, int64_t begin, int64_t end) {
  const typename X::Stored* __restrict x = (const typename X::Stored*)op.in.x;
  float* __restrict residual = op.in.residual;
  const float scale = *op.in.loss_scale, inverse = divide(1.0f, scale), nothing = mul(0.0f, inverse);
  Strata strata(op, op.in.n);
  const int64_t last = strata.from(end);
  for (int64_t s = strata.from(begin); s < last; ++s) {
    const int64_t first = strata.begin(s), stop = strata.begin(s + 1), drawn = strata.element(s, first, stop);
    if (absmax_of<X, kResidual>(x, residual, scale, first, stop) >= kNonFinite) {
      op.values[s] = float_of(kNaN);
      continue;
    }
    const float acc = acc_of<X, kResidual>(x[drawn], residual, drawn, scale);
    op.values[s] = op.scaled ? mul(acc, (float)(stop - first)) : acc;
    if (!kResidual) continue;
#pragma GCC ivdep
    for (int64_t i = first; i < stop; ++i) residual[i] = mul(accumulate(X::load(x[i]), residual[i], scale), inverse);
    residual[drawn] = nothing;
  }
}

void randomk_encode(const RandomkEncode& op, int64_t begin, int64_t end) {
  with_dtype(op.in.dtype, [&](auto x) {
    with_flag(op.in.residual != nullptr, [&](auto residual) { randomk_encode_loop<decltype(x), decltype(residual)::value>(op, begin, end); });
  });
}

template <class Out> void randomk_decode_loop(const RandomkDecodeSum& op, int64_t begin, int64_t end) {
  typename Out::Stored* __restrict out = (typename Out::Stored*)op.out.out;
  Strata strata(op, op.out.n);
  const int64_t last = strata.from(end);
  const typename Out::Stored nothing = Out::store(mul(0.0f, op.out.weight));
  for (int64_t s = strata.from(begin); s < last; ++s) {
    const int64_t first = strata.begin(s), stop = strata.begin(s + 1);
    float sum = op.values[s];
    for (int64_t w = 1; w < op.out.rows; ++w) sum = add(sum, row(op.values, op.out.stride, w)[s]);
    for (int64_t i = first; i < stop; ++i) out[i] = nothing;
    out[strata.element(s, first, stop)] = Out::store(mul(sum, op.out.weight));
  }
}

void randomk_decode_sum(const RandomkDecodeSum& op, int64_t begin, int64_t end) {
  with_dtype(op.out.dtype, [&](auto out) { randomk_decode_loop<decltype(out)>(op, begin, end); });
}

}  // namespace
