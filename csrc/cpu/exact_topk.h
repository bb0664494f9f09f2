// Exact top-k from one pass over the gradient: topk.cpp.
#pragma once
#include "table.h"

namespace commopt::cpu {

void topk_encode(const Table& table, const TopkEncode& op, int threads);
int64_t topk_workspace(int64_t n, int64_t k);

}  // namespace commopt::cpu
