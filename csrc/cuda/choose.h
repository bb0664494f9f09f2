// The k-th largest of many numbers by their bits, from the highest down, with a histogram for some of them at a time.
#pragma once
#include "candidates.h"

namespace commopt::cuda {
namespace {

struct Choice {  // after some bits of the k-th magnitude are known
  uint32_t prefix;
  u64 above;  // elements whose bits are larger
};

// The bin of the element of rank k from the top, and how many elements lie in the bins above. The block works together.
template <int BINS, class Number> __device__ __forceinline__ Choice choose(const Number* histogram, Choice sofar, u64 k) {
  __shared__ Choice result;
  constexpr int kEach = BINS / kThreads;
  int top = BINS - 1 - (int)threadIdx.x * kEach;  // thread 0 has the highest bins
  u64 here[kEach], own = 0, total;
#pragma unroll
  for (int i = 0; i < kEach; ++i) own += here[i] = histogram[top - i];
  u64 above = sofar.above + sum_before(own, total);
  if (above < k && k <= above + own) {
    int bin = top;
    bool passed = true;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      passed = passed && above + here[i] < k;
      if (passed) above += here[i], --bin;
    }
    result = {sofar.prefix * BINS + bin, above};
  }
  __syncthreads();
  return result;
}

}  // namespace
}  // namespace commopt::cuda
