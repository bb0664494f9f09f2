// float16 with a power-of-two scale per block.
//
// Encode: a block owns 2048 elements, a thread a group of 8, block / 8 neighbouring threads a block of the format.
// Bytes per value, float32 x: 4 x + 4 residual read, 2 values + 4 residual + 4 / block scale written.
// Decode: the same ownership; per value 2 + 4 / block of each row read, 4 written.
#include "blocks.h"

namespace commopt::cuda {
namespace {

struct Half {
  fp16* values;
  bool aligned;

  __device__ __forceinline__ BlockScale scale(uint32_t absmax) const { return power_scale(absmax); }

  __device__ __forceinline__ void encode(int64_t group, int count, const float (&acc)[kGroup], BlockScale s, bool usable, float (&sent)[kGroup]) const {
    fp16 v[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      v[i].bits = usable ? to_fp16(mul(acc[i], s.inverse)) : 0;
      sent[i] = mul(from_fp16(v[i].bits), s.scale);
    }
    store8(values + group * kGroup, aligned, count, v);
  }
};

struct Rows {
  const char *sent, *scales;
  int64_t stride;
  PerBlock block;
  bool aligned;

  struct Held {
    fp16 v[kGroup];
    float scale;
  };
  __device__ __forceinline__ Held fetch(int64_t row, int64_t group, int count) const {
    Held held;
    load8(reinterpret_cast<const fp16*>(sent + row * stride) + group * kGroup, aligned, count, held.v);
    held.scale = reinterpret_cast<const float*>(scales + row * stride)[block.of(group)];
    return held;
  }
  __device__ __forceinline__ void values(const Held& held, float (&to)[kGroup]) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) to[i] = mul(widen(held.v[i]), held.scale);
  }
};

}  // namespace

void run(const HalfEncode& op, cudaStream_t stream) {
  launch_encode("half_encode", op.in, Half{reinterpret_cast<fp16*>(op.values), aligned16(op.values)}, op.scales, op.block, stream);
}

void run(const HalfDecodeSum& op, cudaStream_t stream) {
  Rows message{reinterpret_cast<const char*>(op.values), reinterpret_cast<const char*>(op.scales), op.out.stride, PerBlock(op.block),
               aligned16(op.values, op.out.stride)};
  launch_decode("half_decode_sum", op.out, message, stream);
}

}  // namespace commopt::cuda
