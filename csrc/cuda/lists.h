// Adding up lists of entries into sums in shared memory: a warp owns 1024 sums and meets no other.
//
// The rows are added in their order. What a warp adds at once, an entry a lane, is of one row; AHEAD such steps, of one row
// or of several, are under way to it at the same time.
#pragma once
#include "lines.h"

namespace commopt::cuda {
namespace {

template <class T> __device__ __forceinline__ const T* row_of(const T* first, int64_t row, int64_t stride) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(first) + row * stride);
}

__device__ __forceinline__ void clear(float* sum) {
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kQuads; ++m) quads(sum)[own_quad(m)] = {};
  __syncwarp();
}

// For lists of at most 32 entries: load(row, index, value) gives a lane its entry, and add(index, value) is called for the
// rows in their order. A lane without an entry has the index -1.
template <int AHEAD, class Load, class Add> __device__ __forceinline__ void add_short_lists(int rows, Load load, Add add) {
  for (int row = 0; row < rows; row += AHEAD) {
    int at[AHEAD];
    float value[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      at[u] = -1, value[u] = 0.0f;
      if (row + u < rows) load(row + u, at[u], value[u]);
    }
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      if (row + u >= rows) break;
      add(at[u], value[u]);
      __syncwarp();
    }
  }
}

// For lists of any length: list(row) has index, values and count. add(list, index, value, whether this lane has an entry) is
// called for 32 entries at a time, in the order of the rows and of the lists.
template <int AHEAD, class List, class Add> __device__ __forceinline__ void add_lists(int rows, List list, Add add) {
  int lane = threadIdx.x % 32;
  auto next = [](int& row, int& chunk, int count) {
    chunk += 32;
    if (chunk >= count) ++row, chunk = 0;
  };
  auto current = list(0);
  for (int row = 0, chunk = 0, loaded = 0, loaded_chunk = 0; row < rows;) {
    int at[AHEAD];
    float value[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      at[u] = -1, value[u] = 0.0f;
      if (loaded >= rows) continue;
      auto from = list(loaded);
      int entry = loaded_chunk + lane;
      if (entry < from.count) at[u] = from.index[entry], value[u] = from.values[entry];
      next(loaded, loaded_chunk, from.count);
    }
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      if (row >= rows) break;
      if (chunk == 0) current = list(row);
      add(current, at[u], value[u], chunk + lane < current.count);
      __syncwarp();
      next(row, chunk, current.count);
    }
  }
}

// out <- weight * sums.
template <class T> __device__ __forceinline__ void write(T* out, bool aligned, const Lines& lines, float weight, const float* sum) {
  if (aligned && lines.whole()) {
#pragma unroll
    for (int m = 0; m < kQuads; ++m) {
      Four<float> total = quads(sum)[own_quad(m)];
      Four<T> result;
#pragma unroll
      for (int i = 0; i < 4; ++i) narrow(result.v[i], mul(total.v[i], weight));
      quads(out)[lines.quad(m)] = result;
    }
  } else {
#pragma unroll 4
    for (int at = threadIdx.x % 32; at < lines.width; at += 32) narrow(out[lines.element(at)], mul(sum[at], weight));
  }
}

}  // namespace
}  // namespace commopt::cuda
