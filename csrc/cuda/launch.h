// What the kernels share: launching, and eight consecutive values at a time.
//
// A thread owns a group of eight elements: 32 bytes of float32 or 16 of a 16-bit type, moved 16 bytes at a time, and
// one Philox draw. An array that is not 16-byte aligned, and the last group, go element by element; the lines that a
// warp touches stay the same, so memory sees the same traffic.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../codec/half.h"
#include "run.h"

#ifndef LAUNCH  // the emulator in tests/emulator has its own
#define LAUNCH(kernel, blocks, threads, stream, ...) (kernel)<<<(unsigned)(blocks), threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace commopt::cuda {

inline void check(const char* op) {
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// Calls f with a value of the type that `dtype` names.
template <class F> void with_type(int dtype, F f) {
  if (dtype == kFloat32) f(float{});
  if (dtype == kBFloat16) f(bf16{});
  if (dtype == kFloat16) f(fp16{});
}

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kGroup = 8;
constexpr unsigned kAll = 0xffffffffu;  // lanes of a warp

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline bool aligned16(const void* p, int64_t stride = 0) { return ((reinterpret_cast<uintptr_t>(p) | (uintptr_t)stride) & 15) == 0; }
inline int64_t group_blocks(int64_t n) { return ceil_div(n, (int64_t)kGroup * kThreads); }

namespace {

// Blocks to a multiprocessor that the compiler has to leave registers for, if what a kernel reads says so; 0: as it likes.
template <class In, class = void> constexpr int kBlocksOf = 0;
template <class In> constexpr int kBlocksOf<In, std::void_t<decltype(In::kBlocks)>> = In::kBlocks;

// The sum of v over the lanes up to this one.
template <class Number> __device__ __forceinline__ Number sum_upto(Number v) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    Number other = __shfl_up_sync(kAll, v, by);
    if (lane >= by) v += other;
  }
  return v;
}

// The type that moves so many bytes at once.
template <int BYTES> struct Moved {
  using type = uint4;
};
template <> struct Moved<8> {
  using type = uint2;
};

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return from_bf16(v.bits); }
__device__ __forceinline__ float widen(fp16 v) { return from_fp16(v.bits); }
__device__ __forceinline__ void narrow(float& to, float v) { to = v; }
__device__ __forceinline__ void narrow(bf16& to, float v) { to.bits = to_bf16(v); }
__device__ __forceinline__ void narrow(fp16& to, float v) { to.bits = to_fp16(v); }

// How many of the eight elements from `first` on there are.
__device__ __forceinline__ int present(int64_t n, int64_t first) {
  int64_t left = n - first;
  return left >= kGroup ? kGroup : left > 0 ? (int)left : 0;
}

// Whether all elements of a warp are there, where its lanes have neighbouring groups and `first` is this lane's first element.
__device__ __forceinline__ bool whole_warp(int64_t n, int64_t first) { return first + (32 - (int)(threadIdx.x % 32)) * kGroup <= n; }

// Lanes 2 i and 2 i + 1 have the quads 4 i .. 4 i + 3 of a warp's float32, 16 bytes each. Together they store the first two with one
// instruction and the others with the next, which is whole sectors of 32 bytes where each lane's own would be halves, of which each
// goes to the second-level cache by itself. Loads need no such thing: the other half comes from the first-level one. In memory order
// a lane stores quads `place` and `place + 2` of the warp's.
struct Neighbours {
  bool odd = threadIdx.x & 1;
  int place = (int)(threadIdx.x % 32) / 2 * 4 + odd;

  // A lane that is to store a and b gives its neighbour one of them for the other's.
  __device__ __forceinline__ void exchange(uint4& a, uint4& b) const {
    exchange(a.x, b.x), exchange(a.y, b.y), exchange(a.z, b.z), exchange(a.w, b.w);
  }
  __device__ __forceinline__ void exchange(uint32_t& a, uint32_t& b) const {
    uint32_t given = __shfl_xor_sync(kAll, odd ? a : b, 1);
    a = odd ? given : a, b = odd ? b : given;
  }
};

template <class T> __device__ __forceinline__ void load8(const T* p, bool aligned, int count, T (&v)[kGroup]) {
  using Vector = typename Moved<sizeof(T) * kGroup>::type;
  constexpr int kVectors = kGroup * sizeof(T) / (sizeof(Vector));
  if (aligned && count == kGroup) {
    Vector whole[kVectors];
    for (int j = 0; j < kVectors; ++j) whole[j] = reinterpret_cast<const Vector*>(p)[j];
    memcpy(v, whole, sizeof(v));
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) v[i] = i < count ? p[i] : T{};
  }
}

// together: whole_warp, and then all lanes are here.
template <class T> __device__ __forceinline__ void store8(T* p, bool aligned, int count, const T (&v)[kGroup], bool together = false) {
  using Vector = typename Moved<sizeof(T) * kGroup>::type;
  constexpr int kVectors = kGroup * sizeof(T) / (sizeof(Vector));
  if (sizeof(T) == 4 && aligned && together) {
    const Neighbours n;
    uint4* quads = reinterpret_cast<uint4*>(p) - threadIdx.x % 32 * 2 + n.place;
    uint4 whole[2];
    memcpy(whole, v, sizeof(whole));
    n.exchange(whole[0], whole[1]);
    quads[0] = whole[0], quads[2] = whole[1];
  } else if (aligned && count == kGroup) {
    Vector whole[kVectors];
    memcpy(whole, v, sizeof(v));
    for (int j = 0; j < kVectors; ++j) reinterpret_cast<Vector*>(p)[j] = whole[j];
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i < count) p[i] = v[i];
  }
}

// What an encode reads and updates, as the kernels see it.
template <class T> struct Gradient {
  const T* x;
  float* residual;
  const float* loss_scale;
  int64_t n;
  bool x_aligned, residual_aligned;

  explicit Gradient(const Input& in)
      : x(static_cast<const T*>(in.x)), residual(in.residual), loss_scale(in.loss_scale), n(in.n),
        x_aligned(aligned16(in.x)), residual_aligned(aligned16(in.residual)) {}

  // acc and the old residual of one group; zeros past the end.
  __device__ __forceinline__ void load(int64_t first, int count, float scale, float (&acc)[kGroup], float (&old)[kGroup]) const {
    T v[kGroup];
    load8(x + first, x_aligned, count, v);
    if (residual) load8(residual + first, residual_aligned, count, old);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) acc[i] = joined(widen(v[i]), old[i], scale);
  }

  // A value with what was kept of it, if anything is kept.
  __device__ __forceinline__ float joined(float v, float old, float scale) const { return canonical(residual ? accumulate(v, old, scale) : v); }

  __device__ __forceinline__ float at(int64_t i, float scale) const {
    return joined(widen(x[i]), residual ? residual[i] : 0.0f, scale);
  }
};

// total <- row 0 + row 1 + ... of one group. message.fetch(row, ...) reads what message.values(...) decodes: of several rows
// before the first is needed.
template <class Rows> __device__ __forceinline__ void sum_rows(const Rows& message, int64_t rows, int64_t group, int count, float (&total)[kGroup]) {
  using Held = typename Rows::Held;
  constexpr int kAhead = 4;
  for (int64_t first = 0; first < rows; first += kAhead) {
    Held held[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (first + a < rows) held[a] = message.fetch(first + a, group, count);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (first + a >= rows) break;
      float v[kGroup];
      message.values(held[a], v);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) total[i] = first + a ? add(total[i], v[i]) : v[i];
    }
  }
}

// out <- weight * (row 0 + row 1 + ...). A thread owns one group of out.
template <class T, class Rows> __global__ void __launch_bounds__(kThreads, kBlocksOf<Rows>)
decode_sum(T* out, bool out_aligned, float weight, int64_t n, int64_t rows, Rows message) {
  int64_t group = (int64_t)blockIdx.x * kThreads + threadIdx.x, first = group * kGroup;
  int count = present(n, first);
  if (count == 0) return;
  float total[kGroup];
  sum_rows(message, rows, group, count, total);
  T result[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) narrow(result[i], mul(total[i], weight));
  store8(out + first, out_aligned, count, result, whole_warp(n, first));
}

template <class Rows> void launch_decode(const char* op, const Output& o, const Rows& message, cudaStream_t stream) {
  if (o.n == 0) return;
  with_type(o.dtype, [&](auto type) {
    using T = decltype(type);
    LAUNCH((decode_sum<T, Rows>), group_blocks(o.n), kThreads, stream, static_cast<T*>(o.out), aligned16(o.out), o.weight, o.n, o.rows, message);
  });
  check(op);
}

}  // namespace
}  // namespace commopt::cuda
