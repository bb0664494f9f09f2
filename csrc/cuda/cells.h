// Stretches of memory of any alignment, 16 bytes at a time.
#pragma once
#include "launch.h"

namespace commopt::cuda {
namespace {

// The 16-byte cells of memory that hold `count` values from `first` on. Only those values are touched: the first and the
// last cell may hold others, which belong to somebody else.
template <class U> struct Cells {
  static constexpr int kEach = 16 / sizeof(U), kPerWord = 4 / sizeof(U), kBits = 8 * sizeof(U);
  U* base;             // the first cell
  int64_t begin, end;  // where the values are, from there

  __host__ __device__ __forceinline__ Cells(U* first, int64_t count) {
    begin = (int64_t)((reinterpret_cast<uintptr_t>(first) & 15) / sizeof(U));
    base = reinterpret_cast<U*>(reinterpret_cast<uintptr_t>(first) & ~(uintptr_t)15);
    end = begin + count;
  }
  __host__ __device__ __forceinline__ int64_t count() const { return (end + kEach - 1) / kEach; }
  __device__ __forceinline__ bool whole(int64_t cell) const { return cell * kEach >= begin && (cell + 1) * kEach <= end; }
  __device__ __forceinline__ bool holds(int64_t cell, int i) const { return cell * kEach + i >= begin && cell * kEach + i < end; }

  __device__ __forceinline__ uint4 whole_at(int64_t cell) const { return reinterpret_cast<const uint4*>(base)[cell]; }

  // Zeros in the place of others' values.
  __device__ __forceinline__ uint4 load(int64_t cell) const {
    if (whole(cell)) return whole_at(cell);
    uint32_t word[4] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (holds(cell, i)) word[i / kPerWord] |= (uint32_t)base[cell * kEach + i] << (i % kPerWord * kBits);
    return {word[0], word[1], word[2], word[3]};
  }

  __device__ __forceinline__ void store(int64_t cell, uint4 v) const {
    if (whole(cell)) {
      reinterpret_cast<uint4*>(base)[cell] = v;
      return;
    }
    uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (holds(cell, i)) base[cell * kEach + i] = (U)(word[i / kPerWord] >> (i % kPerWord * kBits));
  }
};

}  // namespace
}  // namespace commopt::cuda
