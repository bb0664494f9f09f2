// Encoding in blocks that share a scale, for any codec: absmax of the block, its scale, then the codes and the residual.
//
// A codec has scale(absmax), a BlockScale or SharedScale that is NaN where the block cannot be used, and
// encode(group, count, acc, scale, usable, sent). A message holds the scale itself or, in bytes, its code.
#pragma once
#include "../codec/floats.h"
#include "../codec/quantize.h"
#include "launch.h"

namespace commopt::cuda {
namespace {

// Block number of a group, where the block is 8 * per_block elements. Most blocks are powers of two.
struct PerBlock {
  int per_block, shift;  // shift < 0: no power of two

  explicit PerBlock(int block) : per_block(block / kGroup), shift(-1) {
    for (int s = 0; s < 28; ++s)
      if (per_block == 1 << s) shift = s;
  }
  __device__ __forceinline__ int64_t of(int64_t group) const { return shift >= 0 ? group >> shift : group / per_block; }
};

__device__ __forceinline__ uint32_t absmax_of(const float (&acc)[kGroup]) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) most = max(most, magnitude(acc[i]));
  return most;
}

__device__ __forceinline__ void put(float* to, const BlockScale& scale) { *to = scale.scale; }
__device__ __forceinline__ void put(uint8_t* to, const SharedScale& scale) { *to = (uint8_t)scale.code; }

template <class In, class Codec>
__device__ __forceinline__ void encode_group(const In& in, const Codec& codec, int64_t group, int count, const float (&acc)[kGroup],
                                             BlockScale scale, float inverse_loss_scale, bool together) {
  float sent[kGroup];
  bool usable = magnitude(scale.scale) < kNonFinite;
  codec.encode(group, count, acc, scale, usable, sent);
  if (together) together = __all_sync(kAll, usable);
  if (!in.residual || !usable) return;
  float kept[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) kept[i] = mul(sub(acc[i], sent[i]), inverse_loss_scale);
  store8(in.residual + group * kGroup, in.residual_aligned, count, kept, together);
}

// A CUDA block owns 2048 elements, a thread 8 of them, `lanes` neighbouring threads one block (a power of two, <= 256).
template <class In, class Codec, class S> __global__ void __launch_bounds__(kThreads, kBlocksOf<In>) encode_blocks(In in, Codec codec, S* scales, int shift) {
  __shared__ uint32_t of_warp[kThreads / 32];
  int64_t group = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  int count = present(in.n, group * kGroup), lanes = 1 << shift;
  float loss_scale = *in.loss_scale, acc[kGroup], old[kGroup];
  in.load(count ? group * kGroup : 0, count, loss_scale, acc, old);
  uint32_t most = absmax_of(acc);
  for (int apart = min(lanes, 32) / 2; apart; apart /= 2) most = max(most, __shfl_xor_sync(kAll, most, apart));
  if (lanes > 32) {
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = most;
    __syncthreads();
    int warps = lanes / 32, begin = threadIdx.x / lanes * warps;
    for (int w = begin; w < begin + warps; ++w) most = max(most, of_warp[w]);
  }
  if (count == 0) return;
  const auto scale = codec.scale(most);
  if ((threadIdx.x & (lanes - 1)) == 0) put(scales + (group >> shift), scale);
  encode_group(in, codec, group, count, acc, scale, divide(1.0f, loss_scale), whole_warp(in.n, group * kGroup));
}

// Any other block length: a warp owns a block and reads it twice, the second time from the cache. With two blocks to a
// multiprocessor there are registers for both; left to itself the compiler spills a few to have more of them.
template <class In, class Codec, class S>
__global__ void __launch_bounds__(kThreads, 2) encode_long_blocks(In in, Codec codec, S* scales, int per_block, int64_t blocks) {
  int64_t block = (int64_t)blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (block >= blocks) return;
  int64_t begin = block * per_block;
  float loss_scale = *in.loss_scale, acc[kGroup], old[kGroup];
  uint32_t most = 0;
  for (int j = threadIdx.x % 32; j < per_block; j += 32) {
    int64_t first = (begin + j) * kGroup;
    int count = present(in.n, first);
    if (count == 0) break;
    in.load(first, count, loss_scale, acc, old);
    most = max(most, absmax_of(acc));
  }
  for (int apart = 16; apart; apart /= 2) most = max(most, __shfl_xor_sync(kAll, most, apart));
  const auto scale = codec.scale(most);
  if (threadIdx.x % 32 == 0) put(scales + block, scale);
  for (int j = threadIdx.x % 32; j < per_block; j += 32) {
    int64_t first = (begin + j) * kGroup;
    int count = present(in.n, first);
    if (count == 0) break;
    in.load(first, count, loss_scale, acc, old);
    encode_group(in, codec, begin + j, count, acc, scale, divide(1.0f, loss_scale), false);
  }
}

// in: a Gradient, or what has the same members.
template <class In, class Codec, class S> void launch_blocks(const In& in, const Codec& codec, S* scales, int block, cudaStream_t stream) {
  PerBlock per(block);
  int64_t blocks = ceil_div(in.n, block);
  if (per.shift >= 0 && per.per_block <= kThreads)
    LAUNCH((encode_blocks<In, Codec, S>), group_blocks(in.n), kThreads, stream, in, codec, scales, per.shift);
  else
    LAUNCH((encode_long_blocks<In, Codec, S>), ceil_div(blocks, kThreads / 32), kThreads, stream, in, codec, scales, per.per_block, blocks);
}

template <class Codec, class S> void launch_encode(const char* op, const Input& in, const Codec& codec, S* scales, int block, cudaStream_t stream) {
  if (in.n == 0) return;
  with_type(in.dtype, [&](auto type) { launch_blocks(Gradient<decltype(type)>(in), codec, scales, block, stream); });
  check(op);
}

}  // namespace
}  // namespace commopt::cuda
