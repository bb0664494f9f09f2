// The loop of threshold top-k; threshold.cpp cuts it into parts and joins their lists.
#pragma once
#include "candidates.h"

namespace {

template <class X, bool kResidual, bool kOften> void threshold_loop(const ThresholdScan& scan, ThresholdPart& part) {
  const typename X::Stored* __restrict x = (const typename X::Stored*)scan.in.x;
  float* __restrict residual = scan.in.residual;
  const float scale = *scan.in.loss_scale, inverse = divide(1.0f, scale);
  alignas(64) float acc[kGroup] = {};
  for (int64_t at = part.begin; at < part.end;) {
    const int64_t stop = least(part.end, at + kStretch);
    int64_t held = part.held;
    for (int count; at < stop; at += count) {
      count = (int)least(kGroup - at % kGroup, stop - at);  // a part may begin anywhere; whole groups begin where lines do
      scan_group<X, kResidual, false>(x, residual, at, count, {scale, inverse, scan.threshold, 1}, acc);
      held += pick_group<kOften>(acc, count, scan.threshold, (uint32_t)(at - part.begin), part.acc + held, part.offset + held);
    }
    for (int64_t i = part.held; i < held; ++i) {
      part.acc[i] = canonical(part.acc[i]);
      const uint32_t key = magnitude(part.acc[i]), bin = (key - scan.threshold) >> kThresholdWidth;
      ++part.bins[bin < (uint32_t)kThresholdBins ? bin : kThresholdBins - 1];
      part.bad |= key >= kNonFinite;
    }
    for (int64_t i = part.room; i < held; ++i)
      if (kResidual && magnitude(part.acc[i]) < kNonFinite) residual[part.begin + part.offset[i]] = mul(part.acc[i], inverse);
    part.held = least(held, part.room);
  }
}

void threshold_scan(const ThresholdScan& scan, ThresholdPart& part) {
  with_dtype(scan.in.dtype, [&](auto x) {
    with_flag(scan.in.residual != nullptr, [&](auto residual) {
      with_flag(scan.often, [&](auto often) {
        threshold_loop<decltype(x), decltype(residual)::value, decltype(often)::value>(scan, part);
      });
    });
  });
}

}  // namespace
