// The sign of each value and the mean magnitude of its block.
//
// Encode: a warp owns a block of the format; one of more than 1024 elements it reads twice, the second time from the cache. A step
// of the warp is 256 elements, two rows of the 128 partial sums: lanes 0 .. 15 hold the sums, eight each, and add the other lanes'
// row after theirs.
// Bytes per value, float32 x: 4 x + 4 residual read, 1/8 signs + 4 residual + 4 / block scale written.
// Decode: a thread owns a group of 8; per value 1/8 + 4 / block of each row read, 4 written.
// Vote: the same ownership; the first group of a block writes its scale too. What a decode reads, and 1/8 + 4 / block written.
#include "../codec/sign.h"
#include "blocks.h"

namespace commopt::cuda {
namespace {

// kHeld: groups that a lane holds at once; more than one only where they are all that it has of the block, and are read once.
template <int kHeld, class T> __global__ void __launch_bounds__(kThreads) encode_signs(Gradient<T> in, uint8_t* signs, float* scales, int per_block, int64_t blocks) {
  int64_t block = (int64_t)blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (block >= blocks) return;
  int lane = threadIdx.x % 32;
  int64_t begin = block * per_block;
  float loss_scale = *in.loss_scale, inverse_loss_scale = divide(1.0f, loss_scale), acc[kHeld][kGroup], old[kGroup], partial[kGroup] = {};
  uint32_t most = 0;
  auto load = [&](int j, float (&to)[kGroup]) {
    int64_t first = (begin + j) * kGroup;
    int count = j < per_block ? present(in.n, first) : 0;
    in.load(count ? first : 0, count, loss_scale, to, old);
    return count;
  };
  for (int j = lane; j < per_block + lane; j += 32 * kHeld) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) load(j + 32 * h, acc[h]);
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      most = max(most, absmax_of(acc[h]));
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        float size = float_of(magnitude(acc[h][i]));
        partial[i] = add(add(partial[i], size), __shfl_xor_sync(kAll, size, 16));
      }
    }
  }
  for (int apart = 16; apart; apart /= 2) most = max(most, __shfl_xor_sync(kAll, most, apart));
  for (int apart = 8; apart; apart /= 2)
#pragma unroll
    for (int i = 0; i < kGroup; ++i) partial[i] = add(partial[i], __shfl_xor_sync(kAll, partial[i], apart));
#pragma unroll
  for (int half = kGroup / 2; half; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) partial[i] = add(partial[i], partial[i + half]);
  int64_t left = in.n - begin * kGroup;
  float mean = mean_of(__shfl_sync(kAll, partial[0], 0), left < per_block * kGroup ? (int)left : per_block * kGroup);
  bool usable = most < kNonFinite;
  if (lane == 0) scales[block] = usable ? mean : float_of(kNaN);
  for (int j = lane; j < per_block; j += 32 * kHeld) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      int64_t first = (begin + j + 32 * h) * kGroup;
      int count = kHeld == 1 ? load(j, acc[0]) : j + 32 * h < per_block ? present(in.n, first) : 0;
      if (count == 0) break;
      uint32_t byte = 0;
      float kept[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        bool negative = usable && acc[h][i] < 0.0f;
        byte |= (uint32_t)negative << i;
        kept[i] = mul(sub(acc[h][i], negative ? -mean : mean), inverse_loss_scale);
      }
      signs[begin + j + 32 * h] = (uint8_t)byte;
      bool together = j - lane + 32 * h + 32 <= per_block && whole_warp(in.n, first);
      if (in.residual && usable) store8(in.residual + first, in.residual_aligned, count, kept, together);
    }
  }
}

struct Rows {
  const char *signs, *scales;
  int64_t stride;
  PerBlock block;

  struct Held {
    uint32_t negative;  // a bit for each
    float scale;
  };
  __device__ __forceinline__ Held fetch(int64_t row, int64_t group, int) const {
    return {reinterpret_cast<const uint8_t*>(signs + row * stride)[group], reinterpret_cast<const float*>(scales + row * stride)[block.of(group)]};
  }
  __device__ __forceinline__ void values(const Held& held, float (&to)[kGroup]) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) to[i] = held.negative >> i & 1u ? -held.scale : held.scale;
  }
};

__global__ void __launch_bounds__(kThreads) vote(Rows message, uint8_t* signs, float* scales, int64_t n, int64_t rows) {
  int64_t group = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  int count = present(n, group * kGroup);
  if (count == 0) return;
  float total = 0.0f, sum[kGroup];
  bool usable = true;
  int ahead[kGroup] = {};  // negative rows less positive ones
#pragma unroll 4
  for (int64_t row = 0; row < rows; ++row) {
    Rows::Held held = message.fetch(row, group, count);
    float v[kGroup];
    message.values(held, v);
    usable = usable && magnitude(held.scale) < kNonFinite;
    total = row ? add(total, held.scale) : held.scale;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      ahead[i] += held.negative >> i & 1u ? 1 : -1;
      sum[i] = row ? add(sum[i], v[i]) : v[i];
    }
  }
  uint32_t byte = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) byte |= (uint32_t)(usable && i < count && (ahead[i] > 0 || (ahead[i] == 0 && sum[i] < 0.0f))) << i;
  signs[group] = (uint8_t)byte;
  int64_t block = message.block.of(group);
  if (block * message.block.per_block == group) scales[block] = usable ? finite_of(total) : float_of(kNaN);
}

Rows rows_of(const SignDecodeSum& op) {
  return {reinterpret_cast<const char*>(op.signs), reinterpret_cast<const char*>(op.scales), op.out.stride, PerBlock(op.block)};
}

}  // namespace

void run(const SignEncode& op, cudaStream_t stream) {
  if (op.in.n == 0) return;
  int64_t blocks = ceil_div(op.in.n, op.block);
  with_type(op.in.dtype, [&](auto type) {
    using T = decltype(type);
    auto launch = [&](auto kernel) {
      LAUNCH((kernel), ceil_div(blocks, kThreads / 32), kThreads, stream, Gradient<T>(op.in), op.signs, op.scales, op.block / kGroup, blocks);
    };
    op.block <= 1024 ? launch(encode_signs<4, T>) : launch(encode_signs<1, T>);
  });
  check("sign_encode");
}

void run(const SignDecodeSum& op, cudaStream_t stream) {
  launch_decode("sign_decode_sum", op.out, rows_of(op), stream);
}

void run(const SignVote& op, cudaStream_t stream) {
  if (op.from.out.n == 0) return;
  LAUNCH(vote, group_blocks(op.from.out.n), kThreads, stream, rows_of(op.from), op.signs, op.scales, op.from.out.n, op.from.out.rows);
  check("sign_vote");
}

}  // namespace commopt::cuda
