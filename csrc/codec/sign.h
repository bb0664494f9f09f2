// The scale of a block of signs: the mean magnitude.
#pragma once
#include "bits.h"

namespace {

constexpr int kPartials = 128;  // sums of a block: element i goes to i % 128

// sum: of the `count` magnitudes, all finite. It may have overflowed.
CODEC float mean_of(float sum, int count) {
  return divide(bits_of(sum) < kNonFinite ? sum : float_of(kNonFinite - 1), (float)count);
}

}  // namespace
