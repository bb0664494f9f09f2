// One element, drawn at random, of each of k strata of neighbours.
#pragma once
#include "../codec/strata.h"
#include "half.h"
#include "values.h"

namespace {

using commopt::RandomkDecodeSum;
using commopt::RandomkEncode;

// The strata, and the numbers of the four that were last asked for.
struct Draws : Strata {
  Philox4 four = {};
  int64_t known = -1;

  template <class Op> Draws(const Op& op, int64_t n) : Strata(op, n) {}

  // The first stratum that begins at `at` or after it.
  CODEC int64_t from(int64_t at) const { return at > 0 ? of(at - 1) + 1 : 0; }
  CODEC int64_t element(int64_t s, int64_t first, int64_t stop) {
    if (s / 4 != known) known = s / 4, four = numbers(known);
    return first + drawn_by(four.word[s % 4], stop - first);
  }
};

template <class X, bool kResidual> void randomk_encode_loop(const RandomkEncode& op, int64_t begin, int64_t end) {
  const typename X::Stored* __restrict x = (const typename X::Stored*)op.in.x;
  float* __restrict residual = op.in.residual;
  const float scale = *op.in.loss_scale, inverse = divide(1.0f, scale), nothing = mul(0.0f, inverse);
  Draws strata(op, op.in.n);
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
  Draws strata(op, op.out.n);
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
