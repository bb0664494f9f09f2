// The Walsh-Hadamard rotation of stretches of 128 elements.
//
// A thread owns a group of 8, sixteen neighbouring threads a stretch: three steps of the butterfly pair values of one thread,
// four pair those of two. Bytes per value, float32 x: encode 4 x + 4 residual read, 4 written; keep 4 more read; decode 4 + 4.
#include "../codec/hadamard.h"
#include "blocks.h"

namespace commopt::cuda {
namespace {

// 2^-3.5 times the butterfly of a stretch, by all threads of a warp.
__device__ __forceinline__ void rotate(float (&v)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) v[i] = mul(v[i], kRoot);
#pragma unroll
  for (int apart = 1; apart < kGroup; apart *= 2)
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (!(i & apart)) {
        float a = v[i], b = v[i + apart];
        v[i] = add(a, b);
        v[i + apart] = sub(a, b);
      }
#pragma unroll
  for (int apart = 1; apart < kStretch / kGroup; apart *= 2) {
    bool second = threadIdx.x & apart;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float other = __shfl_xor_sync(kAll, v[i], apart);
      v[i] = second ? sub(other, v[i]) : add(v[i], other);
    }
  }
}

__device__ __forceinline__ void flip(float (&v)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) v[i] = float_of(bits_of(v[i]) ^ flip_of((int)(threadIdx.x % (kStretch / kGroup)) * kGroup + i));
}

struct Place {  // of a thread's group
  int64_t first;
  int count;
  bool whole;  // its stretch is as long as the others
  __device__ __forceinline__ explicit Place(int64_t n)
      : first(((int64_t)blockIdx.x * kThreads + threadIdx.x) * kGroup), count(present(n, first)), whole((first / kStretch + 1) * kStretch <= n) {}
};

// D H of the rotated values of a group.
__device__ __forceinline__ void rotated_back(const float* rotated, bool aligned, const Place& at, float (&value)[kGroup]) {
  float given[kGroup];
  load8(rotated + (at.count ? at.first : 0), aligned, at.count, given);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) value[i] = given[i];
  rotate(value);
  flip(value);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) value[i] = at.whole ? value[i] : given[i];
}

template <class T> __global__ void __launch_bounds__(kThreads) encode_rotated(Gradient<T> in, float* rotated, bool aligned) {
  Place at(in.n);
  float acc[kGroup], old[kGroup], v[kGroup];
  in.load(at.count ? at.first : 0, at.count, *in.loss_scale, acc, old);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) v[i] = acc[i];
  flip(v);
  rotate(v);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) v[i] = at.whole ? v[i] : acc[i];
  if (at.count) store8(rotated + at.first, aligned, at.count, v, whole_warp(in.n, at.first));
}

template <class T> __global__ void __launch_bounds__(kThreads) keep_rotated(Gradient<T> in, const float* rotated, bool aligned) {
  Place at(in.n);
  float sent[kGroup], acc[kGroup], old[kGroup] = {}, kept[kGroup], loss_scale = *in.loss_scale, inverse_loss_scale = divide(1.0f, loss_scale);
  rotated_back(rotated, aligned, at, sent);
  if (at.count == 0) return;
  in.load(at.first, at.count, loss_scale, acc, old);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) kept[i] = magnitude(sent[i]) < kNonFinite ? mul(sub(acc[i], sent[i]), inverse_loss_scale) : old[i];
  store8(in.residual + at.first, in.residual_aligned, at.count, kept, whole_warp(in.n, at.first));
}

template <class T> __global__ void __launch_bounds__(kThreads)
decode_rotated(T* out, bool out_aligned, float weight, int64_t n, const float* rotated, bool aligned) {
  Place at(n);
  float value[kGroup];
  rotated_back(rotated, aligned, at, value);
  T result[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) narrow(result[i], mul(value[i], weight));
  if (at.count) store8(out + at.first, out_aligned, at.count, result, whole_warp(n, at.first));
}

}  // namespace

void run(const HadamardEncode& op, cudaStream_t stream) {
  if (op.in.n == 0) return;
  with_type(op.in.dtype, [&](auto type) {
    using T = decltype(type);
    LAUNCH((encode_rotated<T>), group_blocks(op.in.n), kThreads, stream, Gradient<T>(op.in), op.rotated, aligned16(op.rotated));
  });
  check("hadamard_encode");
}

void run(const HadamardKeep& op, cudaStream_t stream) {
  if (op.in.n == 0) return;
  with_type(op.in.dtype, [&](auto type) {
    using T = decltype(type);
    LAUNCH((keep_rotated<T>), group_blocks(op.in.n), kThreads, stream, Gradient<T>(op.in), op.rotated, aligned16(op.rotated));
  });
  check("hadamard_keep");
}

void run(const HadamardDecode& op, cudaStream_t stream) {
  if (op.n == 0) return;
  with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    LAUNCH((decode_rotated<T>), group_blocks(op.n), kThreads, stream, static_cast<T*>(op.out), aligned16(op.out), op.weight, op.n, op.rotated,
           aligned16(op.rotated));
  });
  check("hadamard_decode");
}

}  // namespace commopt::cuda
