// The threshold of the next call, from how far above this one's the magnitudes are that reached it.
// commopt/backends/reference/threshold.py says how and why. All of it is arithmetic of whole numbers.
#pragma once
#include "bits.h"

namespace {

constexpr int kThresholdBins = 16;   // of the distances from the threshold; the last is open
constexpr int kThresholdWidth = 19;  // bits of a bin: a 16th of an octave

CODEC int64_t more_of(int64_t a, int64_t b) { return a > b ? a : b; }
CODEC int64_t less_of(int64_t a, int64_t b) { return a < b ? a : b; }

// control: (threshold, what it should have been), of the next call and of the last. counts: [kThresholdBins], all finite.
CODEC void carry_threshold(int32_t* control, int64_t threshold, const int64_t* counts, int64_t k) {
  int64_t c = 0, fitting = 0, next = 0;
  for (int j = 0; j < kThresholdBins; ++j) c += counts[j];
  if (k > 0 && 4 * c >= k && counts[kThresholdBins - 1] < k) {
    int j = kThresholdBins - 1;
    int64_t reach = counts[j];  // how many are in this bin or higher
    while (c >= k ? reach < k : 2 * reach < c) reach += counts[--j];
    const int64_t below = (int64_t)j << kThresholdWidth;
    if (c >= k) {
      fitting = threshold + below + ((reach - k) << kThresholdWidth) / counts[j];
    } else {
      const int64_t half = below + ((2 * reach - c) << kThresholdWidth) / (2 * counts[j]);
      fitting = more_of(1, threshold - half * (k - c) / c);
    }
    next = fitting + (control[1] ? (fitting - control[1]) >> 1 : 0);
    next = less_of(more_of(1, next), kNonFinite);
  }
  control[0] = (int32_t)next, control[1] = (int32_t)fitting;
}

// The element that a first threshold is made with: one of each of m stretches of n elements, at places that have no period.
CODEC int64_t sampled(int64_t j, int64_t n, int64_t m) {
  return j * n / m + (int64_t)((((uint64_t)j * 2654435761u & 0xffffffff) * (uint64_t)(n / m)) >> 32);
}

}  // namespace
