// Threshold top-k: threshold.cpp.
#pragma once
#include "table.h"

namespace commopt::cpu {

void threshold_encode(const Table& table, const ThresholdEncode& op, int threads);
int64_t threshold_workspace(int64_t n, int64_t k);

}  // namespace commopt::cpu
