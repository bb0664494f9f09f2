// Integer codes with a scale that all ranks share.
//
// Absmax: up to 32 neighbouring threads own a block of the format. Bytes per value, float32 x: 4 x + 4 residual read.
// Encode: a thread owns a group of 8; per value 4 x + 4 residual + 4 / block absmax read, width / 8 codes + 4 residual written.
// Decode: the same ownership; per value width / 8 + 4 / block read, 4 written.
#include "../codec/philox.h"
#include "blocks.h"

namespace commopt::cuda {
namespace {

template <class T> __global__ void __launch_bounds__(kThreads) measure(Gradient<T> in, uint32_t* absmax, int per_block, int lanes, int64_t blocks) {
  int64_t block = ((int64_t)blockIdx.x * kThreads + threadIdx.x) / lanes;
  int lane = threadIdx.x & (lanes - 1);
  float acc[kGroup], old[kGroup], loss_scale = *in.loss_scale;
  uint32_t most = 0;
  for (int j = lane; j < per_block; j += lanes) {
    int64_t first = (block * per_block + j) * kGroup;
    int count = present(in.n, first);
    if (count == 0) break;
    in.load(first, count, loss_scale, acc, old);
    most = max(most, absmax_of(acc));
  }
  for (int apart = lanes / 2; apart; apart /= 2) most = max(most, __shfl_xor_sync(kAll, most, apart));
  if (lane == 0 && block < blocks) absmax[block] = most;
}

// WIDTH bytes hold the codes of a group.
template <int WIDTH> struct Summed {
  const uint32_t* absmax;
  uint8_t* codes;
  PerBlock block;
  int levels, zero;
  bool aligned, stochastic;
  uint64_t seed;
  uint32_t step, stream;

  __device__ __forceinline__ BlockScale scale(int64_t group) const {
    return block_scale(absmax[block.of(group)], (float)steps_of(levels, stochastic));
  }

  __device__ __forceinline__ void encode(int64_t group, int count, const float (&acc)[kGroup], BlockScale s, bool usable, float (&sent)[kGroup]) const {
    uint32_t word[WIDTH / 4] = {};
    Philox4 random = {};
    if (stochastic) random = philox(seed, step, stream, (uint64_t)group);
    float most = (float)levels;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float q = stochastic ? quantize_stochastic(acc[i], s.inverse, most, philox16(random, i)) : quantize(acc[i], s.inverse, most);
      if (!usable) q = 0.0f;
      sent[i] = dequantize(q, s.scale);
      if (i < count) word[i * WIDTH / 32] |= (uint32_t)((int)q + zero) << (i * WIDTH % 32);
    }
    uint8_t* to = codes + group * WIDTH;
    if (aligned && count == kGroup) {
      memcpy(__builtin_assume_aligned(to, WIDTH), word, WIDTH);
    } else {
#pragma unroll
      for (int j = 0; j < WIDTH; ++j)
        if (j < (count * WIDTH + 7) / 8) to[j] = (uint8_t)(word[j / 4] >> (8 * (j % 4)));
    }
  }

  __device__ __forceinline__ void load(int64_t group, int count, float (&to)[kGroup]) const {
    const uint8_t* from = codes + group * WIDTH;
    uint32_t word[WIDTH / 4] = {};
    if (aligned && count == kGroup) {
      memcpy(word, __builtin_assume_aligned(from, WIDTH), WIDTH);
    } else {
#pragma unroll
      for (int j = 0; j < WIDTH; ++j)
        if (j < (count * WIDTH + 7) / 8) word[j / 4] |= (uint32_t)from[j] << (8 * (j % 4));
    }
    float step_size = scale(group).scale;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      uint32_t code = word[i * WIDTH / 32] >> (i * WIDTH % 32) & ((1u << WIDTH) - 1u);
      to[i] = dequantize((float)((int)code - zero), step_size);
    }
  }
};

// begin .. end - 1: bytes behind the codes, which become zero.
template <class T, class Codec> __global__ void __launch_bounds__(kThreads) encode_shared(Gradient<T> in, Codec codec, int64_t begin, int64_t end) {
  int64_t group = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  for (int64_t at = begin + group; at < end; at += (int64_t)gridDim.x * kThreads) codec.codes[at] = 0;
  int count = present(in.n, group * kGroup);
  if (count == 0) return;
  float loss_scale = *in.loss_scale, acc[kGroup], old[kGroup];
  in.load(group * kGroup, count, loss_scale, acc, old);
  encode_group(in, codec, group, count, acc, codec.scale(group), divide(1.0f, loss_scale), whole_warp(in.n, group * kGroup));
}

template <class T, class Codec> __global__ void __launch_bounds__(kThreads) decode_shared(T* out, bool aligned, float weight, int64_t n, Codec codec) {
  int64_t group = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  int count = present(n, group * kGroup);
  if (count == 0) return;
  float value[kGroup];
  codec.load(group, count, value);
  T result[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) narrow(result[i], mul(value[i], weight));
  store8(out + group * kGroup, aligned, count, result, whole_warp(n, group * kGroup));
}

template <int WIDTH> void encode(const QuantEncodeShared& op, cudaStream_t stream) {
  Summed<WIDTH> codec{op.absmax, op.codes, PerBlock(op.block), op.levels, op.levels, aligned16(op.codes), op.stochastic, op.seed, op.step, op.stream};
  int64_t used = (op.in.n * WIDTH + 7) / 8;
  with_type(op.in.dtype, [&](auto type) {
    using T = decltype(type);
    int64_t blocks = op.in.n ? group_blocks(op.in.n) : 1;
    LAUNCH((encode_shared<T, Summed<WIDTH>>), blocks, kThreads, stream, Gradient<T>(op.in), codec, used, op.nbytes);
  });
  check("quant_encode_shared");
}

template <int WIDTH> void decode(const QuantDecodeShared& op, cudaStream_t stream) {
  if (op.out.n == 0) return;
  Summed<WIDTH> codec{op.absmax, const_cast<uint8_t*>(op.codes), PerBlock(op.block), op.levels, (int)op.out.rows * op.levels,
                      aligned16(op.codes), op.stochastic, 0, 0, 0};
  with_type(op.out.dtype, [&](auto type) {
    using T = decltype(type);
    LAUNCH((decode_shared<T, Summed<WIDTH>>), group_blocks(op.out.n), kThreads, stream, static_cast<T*>(op.out.out), aligned16(op.out.out),
           op.out.weight, op.out.n, codec);
  });
  check("quant_decode_shared");
}

}  // namespace

void run(const QuantAbsMax& op, cudaStream_t stream) {
  if (op.in.n == 0) return;
  int64_t blocks = ceil_div(op.in.n, op.block);
  int per_block = op.block / kGroup, lanes = 1;
  while (lanes < per_block && lanes < 32) lanes *= 2;
  with_type(op.in.dtype, [&](auto type) {
    using T = decltype(type);
    LAUNCH((measure<T>), ceil_div(blocks * lanes, kThreads), kThreads, stream, Gradient<T>(op.in), op.absmax, per_block, lanes, blocks);
  });
  check("quant_absmax");
}

void run(const QuantEncodeShared& op, cudaStream_t stream) {
  if (op.nbytes == 0) return;
  op.width == 16 ? encode<16>(op, stream) : op.width == 8 ? encode<8>(op, stream) : encode<4>(op, stream);
}

void run(const QuantDecodeShared& op, cudaStream_t stream) {
  op.width == 16 ? decode<16>(op, stream) : op.width == 8 ? decode<8>(op, stream) : decode<4>(op, stream);
}

}  // namespace commopt::cuda
