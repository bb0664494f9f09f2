// 8-, 4- and 2-bit integers with a scale per block.
//
// Encode: a block owns 2048 elements, a thread a group of 8, block / 8 neighbouring threads a block of the format.
// Bytes per value, float32 x: 4 x + 4 residual read, bits / 8 codes + 4 residual + 4 / block scale written.
// Decode: the same ownership; per value bits / 8 + 4 / block of each row read, 4 written.
// Resum: the ownership of an encode; per value what a decode reads and 4 residual, and what an encode writes.
#include "../codec/philox.h"
#include "blocks.h"

namespace commopt::cuda {
namespace {

// The bits of a whole group in one go.
template <int BITS> struct Word;
template <> struct Word<8> { using type = uint2; };
template <> struct Word<4> { using type = uint32_t; };
template <> struct Word<2> { using type = uint16_t; };

// Bytes of a message that hold the first `count` codes of a group; a whole group has BITS of them, first element lowest.
template <int BITS> CODEC int bytes_of(int count) { return (count * BITS + 7) / 8; }

template <int BITS> struct Quant {
  static constexpr float kLevels = levels_of(BITS);
  uint8_t* codes;
  bool aligned, stochastic;
  uint64_t seed;
  uint32_t step, stream;

  __device__ __forceinline__ BlockScale scale(uint32_t absmax) const { return block_scale(absmax, steps_of(levels_of(BITS), stochastic)); }

  __device__ __forceinline__ void encode(int64_t group, int count, const float (&acc)[kGroup], BlockScale s, bool usable, float (&sent)[kGroup]) const {
    uint32_t word[2] = {};
    Philox4 random = {};
    if (stochastic) random = philox(seed, step, stream, (uint64_t)group);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float q = stochastic ? quantize_stochastic(acc[i], s.inverse, kLevels, philox16(random, i)) : quantize(acc[i], s.inverse, kLevels);
      if (!usable) q = 0.0f;
      sent[i] = dequantize(q, s.scale);
      uint32_t code = bits_of(add(q, 12582912.0f + zero_of(BITS))) & ((1u << BITS) - 1u);  // a conversion takes far longer
      word[i * BITS / 32] |= code << (i * BITS % 32);
    }
    uint8_t* to = codes + group * BITS;
    if (aligned && count == kGroup) {
      typename Word<BITS>::type whole;
      memcpy(&whole, word, BITS);
      *reinterpret_cast<typename Word<BITS>::type*>(to) = whole;
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

  struct Held {
    uint32_t word[BITS == 8 ? 2 : 1];
    float scale;
  };
  __device__ __forceinline__ Held fetch(int64_t row, int64_t group, int count) const {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(codes + row * stride) + group * BITS;
    Held held = {};
    if (aligned && count == kGroup) {
      typename Word<BITS>::type whole = *reinterpret_cast<const typename Word<BITS>::type*>(from);
      if constexpr (BITS == 8) held.word[0] = whole.x, held.word[1] = whole.y;
      else held.word[0] = whole;
    } else {
#pragma unroll
      for (int j = 0; j < BITS; ++j)
        if (j < bytes_of<BITS>(count)) held.word[j / 4] |= (uint32_t)from[j] << (8 * (j % 4));
    }
    held.scale = reinterpret_cast<const float*>(scales + row * stride)[block.of(group)];
    return held;
  }
  __device__ __forceinline__ void values(const Held& held, float (&to)[kGroup]) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      // As the last bits of a number without a fraction: a conversion takes far longer.
      constexpr uint32_t kSign = BITS == 8 ? 0x80808080u : 0;
      constexpr int kZero = BITS == 8 ? 128 : zero_of(BITS);
      uint32_t word = held.word[i * BITS / 32] ^ kSign;
      uint32_t code = BITS == 8 ? __byte_perm(word, 0x4b000000u, 0x7440 + i % 4) : 0x4b000000u | (word >> (i * BITS % 32) & ((1u << BITS) - 1u));
      to[i] = dequantize(sub(float_of(code), 8388608.0f + kZero), held.scale);
    }
  }
};

// What an encode reads where the gradient is the sum of the rows.
template <int BITS> struct Total : Gradient<float> {
  static constexpr int kBlocks = 4;  // left to itself it spills a few to have more of them
  Rows<BITS> message;
  int64_t rows;

  Total(const Input& in, const Rows<BITS>& message, int64_t rows) : Gradient<float>(in), message(message), rows(rows) {}

  __device__ __forceinline__ void load(int64_t first, int count, float scale, float (&acc)[kGroup], float (&old)[kGroup]) const {
    if (residual) load8(residual + first, residual_aligned, count, old);  // on its way while the rows are added
    sum_rows(message, rows, first / kGroup, count, acc);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) acc[i] = joined(i < count ? acc[i] : 0.0f, old[i], scale);
  }
};

template <int BITS> Quant<BITS> codec_of(const QuantEncode& op) {
  return {op.codes, aligned16(op.codes), op.stochastic, op.seed, op.step, op.stream};
}

template <int BITS> Rows<BITS> rows_of(const QuantDecodeSum& op) {
  return {reinterpret_cast<const char*>(op.codes), reinterpret_cast<const char*>(op.scales), op.out.stride, PerBlock(op.block),
          aligned16(op.codes, op.out.stride)};
}

template <int BITS> void encode(const QuantEncode& op, cudaStream_t stream) {
  launch_encode("quant_encode", op.in, codec_of<BITS>(op), op.scales, op.block, stream);
}

template <int BITS> void decode(const QuantDecodeSum& op, cudaStream_t stream) {
  launch_decode("quant_decode_sum", op.out, rows_of<BITS>(op), stream);
}

template <int BITS> void resum(const QuantResum& op, cudaStream_t stream) {
  if (op.to.in.n == 0) return;
  launch_blocks(Total<BITS>(op.to.in, rows_of<BITS>(op.from), op.from.out.rows), codec_of<BITS>(op.to), op.to.scales, op.to.block, stream);
  check("quant_resum");
}

}  // namespace

void run(const QuantEncode& op, cudaStream_t stream) {
  op.bits == 8 ? encode<8>(op, stream) : op.bits == 4 ? encode<4>(op, stream) : encode<2>(op, stream);
}
void run(const QuantDecodeSum& op, cudaStream_t stream) {
  op.bits == 8 ? decode<8>(op, stream) : op.bits == 4 ? decode<4>(op, stream) : decode<2>(op, stream);
}
void run(const QuantResum& op, cudaStream_t stream) {
  op.to.bits == 8 ? resum<8>(op, stream) : op.to.bits == 4 ? resum<4>(op, stream) : resum<2>(op, stream);
}

}  // namespace commopt::cuda
