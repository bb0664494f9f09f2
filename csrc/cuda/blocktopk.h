// The blocks of block top-k, of 1024 elements spread over the gradient: commopt/backends/reference/blocktopk.py.
//
// A warp owns a block and meets no other. Neighbouring warps own neighbouring blocks, whose lines are neighbours in memory.
#pragma once
#include "lists.h"

namespace commopt::cuda {
namespace {

constexpr int kBlockThreads = 128;  // few, so that a warp that is done waits for few others until new ones may begin
constexpr int kBlockWarps = kBlockThreads / 32;

// The block of a warp; where there is none it has no elements.
struct Block {
  int64_t number, blocks;  // whole ones

  __device__ explicit Block(int64_t n) : number((int64_t)blockIdx.x * kBlockWarps + threadIdx.x / 32), blocks(n / kBlock) {}

  __device__ __forceinline__ Lines lines(int64_t n) const {
    if (number < blocks) return {number * kLine, blocks * kLine, (int)kBlock};
    return {number * kBlock, kLine, number == blocks ? (int)(n % kBlock) : 0};
  }
  __device__ __forceinline__ int entries(int64_t count, int k) const { return number < blocks ? k : (int)(count - blocks * k); }
};

int64_t blocks_of_threads(int64_t n) { return ceil_div(ceil_div(n, kBlock), kBlockWarps); }

}  // namespace
}  // namespace commopt::cuda
