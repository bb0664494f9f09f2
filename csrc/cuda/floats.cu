// Small floats with a scale per block.
//
// Encode: a block owns 2048 elements, a thread a group of 8, block / 8 neighbouring threads a block of the format.
// Bytes per value, float32 x: 4 x + 4 residual read, 1/2 or 1 code + 4 residual + 1 / block or 4 / block scale written.
// Decode: the same ownership; per value the code and its share of the scale of each row read, 4 written.
#include "../codec/floats.h"
#include "../codec/philox.h"
#include "blocks.h"

namespace commopt::cuda {
namespace {

// A scale as the message holds it, and what the encoder and the decoder make of it.
struct InFloat32 {
  using Stored = float;
  template <class E> CODEC static SharedScale shared(uint32_t absmax, const float*) { return float32_scale<E>(absmax); }
  CODEC static float decode(float stored, const float*) { return stored; }
};
struct InE8M0 {
  using Stored = uint8_t;
  template <class E> CODEC static SharedScale shared(uint32_t absmax, const float*) { return e8m0_scale<E>(absmax); }
  CODEC static float decode(uint8_t stored, const float*) { return from_e8m0(stored); }
};
struct InE4M3 {
  using Stored = uint8_t;
  template <class E> CODEC static SharedScale shared(uint32_t absmax, const float* whole) { return e4m3_scale<E>(absmax, *whole); }
  CODEC static float decode(uint8_t stored, const float* whole) { return mul(from_small<E4M3>(stored), *whole); }
};

// Bytes that hold the first `count` codes of a group; a whole group has kBits of them, first element lowest.
template <class E> CODEC int bytes_of(int count) { return E::kBits == 8 ? count : (count + 1) / 2; }

template <class E, class Scaling> struct Floats {
  uint8_t* codes;
  const float* whole;
  bool aligned, stochastic;
  uint64_t seed;
  uint32_t step, stream;

  __device__ __forceinline__ SharedScale scale(uint32_t absmax) const { return Scaling::template shared<E>(absmax, whole); }

  __device__ __forceinline__ void encode(int64_t group, int count, const float (&acc)[kGroup], BlockScale s, bool usable, float (&sent)[kGroup]) const {
    uint32_t word[E::kBits / 4] = {};
    Philox4 random = {};
    if (stochastic) random = philox(seed, step, stream, (uint64_t)group);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float scaled = mul(acc[i], s.inverse);
      Small v = stochastic ? to_small_stochastic<E>(scaled, philox16(random, i)) : to_small<E>(scaled);
      sent[i] = mul(v.value, s.scale);
      word[i * E::kBits / 32] |= (usable ? v.code : 0u) << (i * E::kBits % 32);
    }
    uint8_t* to = codes + group * E::kBits;
    if (aligned && count == kGroup) {
      if (E::kBits == 8)
        *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[E::kBits / 4 - 1]);
      else
        *reinterpret_cast<uint32_t*>(to) = word[0];
    } else {
#pragma unroll
      for (int j = 0; j < E::kBits; ++j)
        if (j < bytes_of<E>(count)) to[j] = (uint8_t)(word[j / 4] >> (8 * (j % 4)));
    }
  }
};

template <class E, class Scaling> struct Rows {
  static constexpr int kBlocks = 4;  // left to itself the compiler spills a few registers to have more of them
  const char *codes, *scales, *whole;
  int64_t stride;
  PerBlock block;
  bool aligned;

  struct Held {
    uint32_t word[E::kBits / 4];
    float scale;
  };
  __device__ __forceinline__ Held fetch(int64_t row, int64_t group, int count) const {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(codes + row * stride) + group * E::kBits;
    Held held = {};
    if (aligned && count == kGroup) {
      if (E::kBits == 8) {
        uint2 both = *reinterpret_cast<const uint2*>(from);
        held.word[0] = both.x, held.word[E::kBits / 4 - 1] = both.y;
      } else {
        held.word[0] = *reinterpret_cast<const uint32_t*>(from);
      }
    } else {
#pragma unroll
      for (int j = 0; j < E::kBits; ++j)
        if (j < bytes_of<E>(count)) held.word[j / 4] |= (uint32_t)from[j] << (8 * (j % 4));
    }
    using Stored = typename Scaling::Stored;
    held.scale = Scaling::decode(reinterpret_cast<const Stored*>(scales + row * stride)[block.of(group)], reinterpret_cast<const float*>(whole + row * stride));
    return held;
  }
  __device__ __forceinline__ void values(const Held& held, float (&to)[kGroup]) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) to[i] = mul(from_small<E>(held.word[i * E::kBits / 32] >> (i * E::kBits % 32)), held.scale);
  }
};

template <class F> void with_format(int element, int scaling, F f) {
  if (element == kE4M3 && scaling == kScaleFloat32) f(E4M3{}, InFloat32{});
  if (element == kE5M2 && scaling == kScaleFloat32) f(E5M2{}, InFloat32{});
  if (element == kE4M3 && scaling == kScaleE8M0) f(E4M3{}, InE8M0{});
  if (element == kE5M2 && scaling == kScaleE8M0) f(E5M2{}, InE8M0{});
  if (element == kE2M1 && scaling == kScaleE8M0) f(E2M1{}, InE8M0{});
  if (element == kE2M1 && scaling == kScaleE4M3) f(E2M1{}, InE4M3{});
  if (element == kPower && scaling == kScaleE8M0) f(Power{}, InE8M0{});
}

__global__ void zero(uint32_t* out) {
  if (threadIdx.x == 0) *out = 0;
}

// A quotient rounds like the largest one or below it: each block divides its own. Reads 8 bytes per value.
template <class T> __global__ void __launch_bounds__(kThreads) absmax(Gradient<T> in, uint32_t* out, float divisor) {
  __shared__ uint32_t of_warp[kThreads / 32];
  int64_t first = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kGroup;
  int count = present(in.n, first);
  float acc[kGroup], old[kGroup];
  in.load(count ? first : 0, count, *in.loss_scale, acc, old);
  uint32_t most = absmax_of(acc);
  for (int apart = 16; apart; apart /= 2) most = max(most, __shfl_xor_sync(kAll, most, apart));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = most;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < kThreads / 32; ++w) most = max(most, of_warp[w]);
  atomicMax(out, bits_of(canonical(divide(float_of(most), divisor))));
}

}  // namespace

void run(const AbsMax& op, cudaStream_t stream) {
  uint32_t* out = reinterpret_cast<uint32_t*>(op.out);
  LAUNCH((zero), 1, 32, stream, out);
  if (op.in.n)
    with_type(op.in.dtype, [&](auto type) {
      using T = decltype(type);
      LAUNCH((absmax<T>), group_blocks(op.in.n), kThreads, stream, Gradient<T>(op.in), out, op.divisor);
    });
  check("absmax");
}

void run(const FloatEncode& op, cudaStream_t stream) {
  with_format(op.element, op.scaling, [&](auto element, auto scaling) {
    using Scaling = decltype(scaling);
    Floats<decltype(element), Scaling> codec{op.codes, op.whole, aligned16(op.codes), op.stochastic, op.seed, op.step, op.stream};
    launch_encode("float_encode", op.in, codec, static_cast<typename Scaling::Stored*>(op.scales), op.block, stream);
  });
}

void run(const FloatDecodeSum& op, cudaStream_t stream) {
  with_format(op.element, op.scaling, [&](auto element, auto scaling) {
    Rows<decltype(element), decltype(scaling)> message{reinterpret_cast<const char*>(op.codes), static_cast<const char*>(op.scales),
                                                       reinterpret_cast<const char*>(op.whole), op.out.stride, PerBlock(op.block),
                                                       aligned16(op.codes, op.out.stride)};
    launch_decode("float_decode_sum", op.out, message, stream);
  });
}

}  // namespace commopt::cuda
