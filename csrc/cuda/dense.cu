// Every value as float32 or bfloat16.
//
// Encode: a block owns 2048 elements, a thread a group of 8. Bytes per value, float32 x and values: 4 x + 4 residual
// read, 4 values + 4 residual written. Decode: the same ownership; per value 4 bytes of each row read, 4 written.
#include "launch.h"

namespace commopt::cuda {
namespace {

template <class T, class V> __global__ void __launch_bounds__(kThreads) encode(Gradient<T> in, V* values, bool values_aligned) {
  int64_t first = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kGroup;
  int count = present(in.n, first);
  if (count == 0) return;
  float scale = *in.loss_scale, inverse = divide(1.0f, scale);
  float acc[kGroup], kept[kGroup];
  in.load(first, count, scale, acc, kept);
  const bool together = whole_warp(in.n, first);
  V v[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    narrow(v[i], acc[i]);
    float sent = widen(v[i]);
    if (in.residual && magnitude(sent) < kNonFinite) kept[i] = mul(sub(acc[i], sent), inverse);
  }
  store8(values + first, values_aligned, count, v, together);
  if (in.residual) store8(in.residual + first, in.residual_aligned, count, kept, together);
}

template <class V> struct Rows {
  const V* sent;
  int64_t stride;
  bool aligned;

  struct Held {
    V v[kGroup];
  };
  __device__ __forceinline__ Held fetch(int64_t row, int64_t group, int count) const {
    Held held;
    load8(reinterpret_cast<const V*>(reinterpret_cast<const char*>(sent) + row * stride) + group * kGroup, aligned, count, held.v);
    return held;
  }
  __device__ __forceinline__ void values(const Held& held, float (&to)[kGroup]) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) to[i] = widen(held.v[i]);
  }
};

template <class F> void with_values(int dtype, F f) {
  if (dtype == kFloat32) f(float{});
  if (dtype == kBFloat16) f(bf16{});
}

}  // namespace

void run(const DenseEncode& op, cudaStream_t stream) {
  if (op.in.n == 0) return;
  with_type(op.in.dtype, [&](auto x) {
    with_values(op.values_dtype, [&](auto v) {
      using T = decltype(x);
      using V = decltype(v);
      LAUNCH((encode<T, V>), group_blocks(op.in.n), kThreads, stream, Gradient<T>(op.in), static_cast<V*>(op.values), aligned16(op.values));
    });
  });
  check("dense_encode");
}

void run(const DenseDecodeSum& op, cudaStream_t stream) {
  with_values(op.values_dtype, [&](auto v) {
    using V = decltype(v);
    Rows<V> message{static_cast<const V*>(op.values), op.out.stride, aligned16(op.values, op.out.stride)};
    launch_decode("dense_decode_sum", op.out, message, stream);
  });
}

}  // namespace commopt::cuda
