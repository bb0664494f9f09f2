// n elements cut into k strata of neighbours, of which the first n % k have one more than the others, and the element that
// each draws: stratum s takes word s % 4 of philox number s / 4.
#pragma once
#include "philox.h"

namespace {

struct Strata {
  int64_t size, longer;  // of a stratum; how many have one more
  uint64_t seed;
  uint32_t step, stream;

  template <class Op> Strata(const Op& op, int64_t n) : size(n / op.k), longer(n % op.k), seed(op.seed), step(op.step), stream(op.stream) {}

  CODEC int64_t begin(int64_t s) const { return s * size + (s < longer ? s : longer); }
  CODEC int64_t of(int64_t element) const {
    const int64_t before = longer * (size + 1);
    return element < before ? element / (size + 1) : longer + (element - before) / size;
  }
  // The numbers of strata 4 * four to 4 * four + 3.
  CODEC Philox4 numbers(int64_t four) const { return philox(seed, step, stream, (uint64_t)four); }
};

// Which element of a stratum of `length` elements, at most 2^31, its number draws.
CODEC int64_t drawn_by(uint32_t number, int64_t length) { return (int64_t)((uint64_t)number * (uint64_t)length >> 32); }

}  // namespace
