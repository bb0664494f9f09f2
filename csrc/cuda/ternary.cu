// One of three values each, five to a byte.
//
// Encode: m / 8 neighbouring threads own a block of 5 m elements, a thread eight bytes of it: the eight elements that it
// holds of each of the five planes stay in its registers.
// Bytes per value, float32 x: 4 x + 4 residual read, 1/5 codes + 4 residual + 4 / block scale written.
// Decode: a thread owns a group of 8 elements; its eight bytes are read by the threads of the other planes too, from the cache.
#include "../codec/philox.h"
#include "../codec/ternary.h"
#include "blocks.h"

namespace commopt::cuda {
namespace {

template <class T> __global__ void __launch_bounds__(kThreads)
encode_ternary(Gradient<T> in, uint8_t* codes, bool aligned, float* scales, int shift, int64_t blocks, bool stochastic, uint64_t seed, uint32_t step,
               uint32_t stream) {
  int64_t thread = (int64_t)blockIdx.x * kThreads + threadIdx.x, block = thread >> shift;
  int lanes = 1 << shift, lane = (int)(thread & (lanes - 1));
  float loss_scale = *in.loss_scale, acc[kDigits][kGroup], old[kGroup];
  uint32_t most = 0;
#pragma unroll
  for (int digit = 0; digit < kDigits; ++digit) {
    int64_t first = ((block * kDigits + digit) * lanes + lane) * kGroup;
    int count = present(in.n, first);
    in.load(count ? first : 0, count, loss_scale, acc[digit], old);
    most = max(most, absmax_of(acc[digit]));
  }
  for (int apart = lanes / 2; apart; apart /= 2) most = max(most, __shfl_xor_sync(kAll, most, apart));
  if (block >= blocks) return;
  BlockScale scale = block_scale(most, steps_of(1, stochastic));
  if (lane == 0) scales[block] = scale.scale;
  bool usable = most < kNonFinite;
  float inverse_loss_scale = divide(1.0f, loss_scale);
  uint32_t word[2] = {};
  int power = 1;
#pragma unroll
  for (int digit = 0; digit < kDigits; ++digit, power *= 3) {
    int64_t group = (block * kDigits + digit) * lanes + lane;
    int count = present(in.n, group * kGroup);
    Philox4 random = {};
    if (stochastic) random = philox(seed, step, stream, (uint64_t)group);
    float kept[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float v = acc[digit][i];
      float q = stochastic ? quantize_stochastic(v, scale.inverse, 1.0f, philox16(random, i)) : quantize(v, scale.inverse, 1.0f);
      if (!usable || i >= count) q = 0.0f;
      word[i / 4] += (uint32_t)(((int)q + 1) * power) << (8 * (i % 4));  // never carries: a byte holds at most 242
      kept[i] = mul(sub(v, dequantize(q, scale.scale)), inverse_loss_scale);
    }
    if (in.residual && usable) store8(in.residual + group * kGroup, in.residual_aligned, count, kept);
  }
  uint8_t* to = codes + (block * lanes + lane) * kGroup;
  if (aligned) {
    *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) to[j] = (uint8_t)(word[j / 4] >> (8 * (j % 4)));
  }
}

struct Rows {
  const char *codes, *scales;
  int64_t stride;
  int shift;  // of the bytes of a block, in eights
  bool aligned;

  struct Held {
    uint32_t word[2];
    float scale;
    int digit;
  };
  __device__ __forceinline__ Held fetch(int64_t row, int64_t group, int) const {
    int64_t block = (group >> shift) / kDigits;
    int within = (int)(group - (block * kDigits << shift)), digit = within >> shift, lane = within & ((1 << shift) - 1);
    const uint8_t* from = reinterpret_cast<const uint8_t*>(codes + row * stride) + ((block << shift) + lane) * kGroup;
    Held held = {{}, reinterpret_cast<const float*>(scales + row * stride)[block], digit};
    if (aligned) {
      uint2 both = *reinterpret_cast<const uint2*>(from);
      held.word[0] = both.x, held.word[1] = both.y;
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) held.word[j / 4] |= (uint32_t)from[j] << (8 * (j % 4));
    }
    return held;
  }
  __device__ __forceinline__ void values(const Held& held, float (&to)[kGroup]) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) to[i] = dequantize((float)((int)digit_of(held.word[i / 4] >> (8 * (i % 4)) & 0xffu, held.digit) - 1), held.scale);
  }
};

int shift_of(int block) {
  int shift = 0;
  while (kDigits * kGroup << shift < block) ++shift;
  return shift;
}

}  // namespace

void run(const TernaryEncode& op, cudaStream_t stream) {
  if (op.in.n == 0) return;
  int shift = shift_of(op.block);
  int64_t blocks = ceil_div(op.in.n, op.block);
  with_type(op.in.dtype, [&](auto type) {
    using T = decltype(type);
    LAUNCH((encode_ternary<T>), ceil_div(blocks << shift, kThreads), kThreads, stream, Gradient<T>(op.in), op.codes, aligned16(op.codes), op.scales,
           shift, blocks, op.stochastic, op.seed, op.step, op.stream);
  });
  check("ternary_encode");
}

void run(const TernaryDecodeSum& op, cudaStream_t stream) {
  Rows message{reinterpret_cast<const char*>(op.codes), reinterpret_cast<const char*>(op.scales), op.out.stride, shift_of(op.block),
               aligned16(op.codes, op.out.stride)};
  launch_decode("ternary_decode_sum", op.out, message, stream);
}

}  // namespace commopt::cuda
