// The scale of a block of signs: the mean magnitude.
#pragma once
#include "bits.h"

namespace {

constexpr int kPartials = 128;  // sums of a block: element i goes to i % 128

// A sum of finite values. The largest there is stands for one that overflowed.
CODEC float finite_of(float sum) { return magnitude(sum) < kNonFinite ? sum : float_of(kNonFinite - 1); }

// sum: of the `count` magnitudes, all finite.
CODEC float mean_of(float sum, int count) { return divide(finite_of(sum), (float)count); }

}  // namespace
