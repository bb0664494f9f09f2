// The two ways to find the largest of a whole gradient, on any number of threads: topk.cpp and threshold.cpp.
#pragma once
#include "../codec/half.h"
#include "table.h"

namespace commopt::cpu {

void topk_encode(const Table& table, const TopkEncode& op, int threads);
int64_t topk_workspace(int64_t n, int64_t k);

void threshold_encode(const Table& table, const ThresholdEncode& op, int threads);
int64_t threshold_workspace(int64_t n, int64_t k);

// One element of the gradient, for what looks at few of them.
static inline float load_x(const Input& in, int64_t i) {
  if (in.dtype == kFloat32) return ((const float*)in.x)[i];
  const uint16_t h = ((const uint16_t*)in.x)[i];
  return in.dtype == kBFloat16 ? from_bf16(h) : from_fp16(h);
}

}  // namespace commopt::cpu
