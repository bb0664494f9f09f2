// 8- and 4-bit integers with a scale per block.
//
// Encode: a block owns 2048 elements, a thread a group of 8, block / 8 neighbouring threads a block of the format.
// Bytes per value, float32 x: 4 x + 4 residual read, bits / 8 codes + 4 residual + 4 / block scale written.
// Decode: the same ownership; per value bits / 8 + 4 / block of each row read, 4 written.
#include "../codec/philox.h"
#include "blocks.h"

namespace commopt::cuda {
namespace {

// Bytes of a message that hold the first `count` codes of a group; a whole group has BITS of them, first element lowest.
template <int BITS> CODEC int bytes_of(int count) { return BITS == 8 ? count : (count + 1) / 2; }

template <int BITS> struct Quant {
  static constexpr float kLevels = BITS == 8 ? 127.0f : 7.0f;
  uint8_t* codes;
  bool aligned, stochastic;
  uint64_t seed;
  uint32_t step, stream;

  __device__ __forceinline__ BlockScale scale(uint32_t absmax) const { return block_scale(absmax, kLevels); }

  __device__ __forceinline__ void encode(int64_t group, int count, const float (&acc)[kGroup], BlockScale s, bool usable, float (&sent)[kGroup]) const {
    uint32_t word[BITS / 4] = {};
    Philox4 random = {};
    if (stochastic) random = philox(seed, step, stream, (uint64_t)group);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float q = stochastic ? quantize_stochastic(acc[i], s.inverse, kLevels, philox16(random, i)) : quantize(acc[i], s.inverse, kLevels);
      if (!usable) q = 0.0f;
      sent[i] = dequantize(q, s.scale);
      if (BITS == 8)
        word[i / 4] |= ((uint32_t)(int)q & 0xffu) << (8 * (i % 4));
      else
        word[0] |= (uint32_t)((int)q + 8) << (4 * i);
    }
    uint8_t* to = codes + group * BITS;
    if (aligned && count == kGroup) {
      if (BITS == 8)
        *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[BITS / 4 - 1]);
      else
        *reinterpret_cast<uint32_t*>(to) = word[0];
    } else {
#pragma unroll
      for (int j = 0; j < BITS; ++j)
        if (j < bytes_of<BITS>(count)) to[j] = (uint8_t)(word[j / 4] >> (8 * (j % 4)));
    }
  }
};

template <int BITS> struct Rows {
  const char *codes, *scales;
  int64_t stride;
  PerBlock block;
  bool aligned;

  __device__ __forceinline__ void load(int64_t row, int64_t group, int count, float (&to)[kGroup]) const {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(codes + row * stride) + group * BITS;
    uint32_t word[2] = {};
    if (aligned && count == kGroup) {
      if (BITS == 8) {
        uint2 both = *reinterpret_cast<const uint2*>(from);
        word[0] = both.x, word[1] = both.y;
      } else {
        word[0] = *reinterpret_cast<const uint32_t*>(from);
      }
    } else {
#pragma unroll
      for (int j = 0; j < BITS; ++j)
        if (j < bytes_of<BITS>(count)) word[j / 4] |= (uint32_t)from[j] << (8 * (j % 4));
    }
    float scale = reinterpret_cast<const float*>(scales + row * stride)[block.of(group)];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      int q = BITS == 8 ? (int)(int8_t)(word[i / 4] >> (8 * (i % 4))) : (int)(word[0] >> (4 * i) & 15u) - 8;
      to[i] = dequantize((float)q, scale);
    }
  }
};

template <int BITS> void encode(const QuantEncode& op, cudaStream_t stream) {
  Quant<BITS> codec{op.codes, aligned16(op.codes), op.stochastic, op.seed, op.step, op.stream};
  launch_encode("quant_encode", op.in, codec, op.scales, op.block, stream);
}

template <int BITS> void decode(const QuantDecodeSum& op, cudaStream_t stream) {
  Rows<BITS> message{reinterpret_cast<const char*>(op.codes), reinterpret_cast<const char*>(op.scales), op.out.stride, PerBlock(op.block),
                     aligned16(op.codes, op.out.stride)};
  launch_decode("quant_decode_sum", op.out, message, stream);
}

}  // namespace

void run(const QuantEncode& op, cudaStream_t stream) { op.bits == 8 ? encode<8>(op, stream) : encode<4>(op, stream); }
void run(const QuantDecodeSum& op, cudaStream_t stream) { op.bits == 8 ? decode<8>(op, stream) : decode<4>(op, stream); }

}  // namespace commopt::cuda
