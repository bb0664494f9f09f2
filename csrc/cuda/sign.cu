// The sign of each value and the mean magnitude of its block.
//
// Encode: a warp owns a block of the format and reads it twice, the second time from the cache. A step of the warp is 256
// elements, two rows of the 128 partial sums: lanes 0 .. 15 hold the sums, eight each, and add the other lanes' row after theirs.
// Bytes per value, float32 x: 4 x + 4 residual read, 1/8 signs + 4 residual + 4 / block scale written.
// Decode: a thread owns a group of 8; per value 1/8 + 4 / block of each row read, 4 written.
// Vote: the same ownership; the first group of a block writes its scale too. What a decode reads, and 1/8 + 4 / block written.
#include "../codec/sign.h"
#include "blocks.h"

namespace commopt::cuda {
namespace {

template <class T> __global__ void __launch_bounds__(kThreads) encode_signs(Gradient<T> in, uint8_t* signs, float* scales, int per_block, int64_t blocks) {
  int64_t block = (int64_t)blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (block >= blocks) return;
  int lane = threadIdx.x % 32;
  int64_t begin = block * per_block;
  float loss_scale = *in.loss_scale, inverse_loss_scale = divide(1.0f, loss_scale), acc[kGroup], old[kGroup], partial[kGroup] = {};
  uint32_t most = 0;
  for (int j = lane; j < per_block + lane; j += 32) {
    int64_t first = (begin + j) * kGroup;
    int count = j < per_block ? present(in.n, first) : 0;
    in.load(count ? first : 0, count, loss_scale, acc, old);
    most = max(most, absmax_of(acc));
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float size = float_of(magnitude(acc[i]));
      partial[i] = add(add(partial[i], size), __shfl_xor_sync(kAll, size, 16));
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
  for (int j = lane; j < per_block; j += 32) {
    int64_t first = (begin + j) * kGroup;
    int count = present(in.n, first);
    if (count == 0) break;
    in.load(first, count, loss_scale, acc, old);
    uint32_t byte = 0;
    float kept[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      bool negative = usable && acc[i] < 0.0f;
      byte |= (uint32_t)negative << i;
      kept[i] = mul(sub(acc[i], negative ? -mean : mean), inverse_loss_scale);
    }
    signs[begin + j] = (uint8_t)byte;
    if (in.residual && usable) store8(in.residual + first, in.residual_aligned, count, kept);
  }
}

struct Rows {
  const char *signs, *scales;
  int64_t stride;
  PerBlock block;

  __device__ __forceinline__ uint32_t byte(int64_t row, int64_t group) const { return reinterpret_cast<const uint8_t*>(signs + row * stride)[group]; }
  __device__ __forceinline__ float scale(int64_t row, int64_t group) const {
    return reinterpret_cast<const float*>(scales + row * stride)[block.of(group)];
  }

  __device__ __forceinline__ void load(int64_t row, int64_t group, int, float (&to)[kGroup]) const {
    uint32_t negative = byte(row, group);
    float size = scale(row, group);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) to[i] = negative >> i & 1u ? -size : size;
  }
};

__global__ void __launch_bounds__(kThreads) vote(Rows message, uint8_t* signs, float* scales, int64_t n, int64_t rows) {
  int64_t group = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  int count = present(n, group * kGroup);
  if (count == 0) return;
  float total = message.scale(0, group), sum[kGroup];
  bool usable = magnitude(total) < kNonFinite;
  int ahead[kGroup];  // negative rows less positive ones
  message.load(0, group, count, sum);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) ahead[i] = message.byte(0, group) >> i & 1u ? 1 : -1;
  for (int64_t row = 1; row < rows; ++row) {
    uint32_t negative = message.byte(row, group);
    float size = message.scale(row, group);
    usable = usable && magnitude(size) < kNonFinite;
    total = add(total, size);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      ahead[i] += negative >> i & 1u ? 1 : -1;
      sum[i] = add(sum[i], negative >> i & 1u ? -size : size);
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
    LAUNCH((encode_signs<T>), ceil_div(blocks, kThreads / 32), kThreads, stream, Gradient<T>(op.in), op.signs, op.scales, op.block / kGroup, blocks);
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
