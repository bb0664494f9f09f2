// Integer codes of 8, 4 or 2 bits that share a scale per block.
#pragma once
#include "../codec/philox.h"
#include "../codec/quantize.h"
#include "half.h"
#include "lanes.h"
#include "values.h"

namespace {

using commopt::Input;
using commopt::QuantDecodeSum;
using commopt::QuantEncode;
using commopt::QuantResum;

// codec/philox.h for a run of elements that begins at a multiple of 8. A counter word sits in the low half of a lane and
// the high half is left as it falls: the next product ignores it. Lanes are in the order that makes evens() come first.
// What does not depend on the low word of the group is worked out once: of the first two rounds one product each is left.
constexpr int kDrawn = 256;  // elements at once; enough independent vectors that none waits for its own products
struct Drawer {
  uint64_t seed;
  uint32_t step, stream;
  Lanes order, key[7][2], first_high, first_low, second_high;
  uint64_t group_high;

  template <class Op> Drawer(const Op& op, int64_t begin) : seed(op.seed), step(op.step), stream(op.stream), group_high((uint64_t)begin / 8 >> 32) {
    uint64_t lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = (uint64_t)(lane / 2 + (lane & 1) * (kLanes / 2));
    order = load(lanes);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    const uint64_t p1 = (uint64_t)0xCD9E8D57u * step;
    const uint32_t c0 = (uint32_t)(p1 >> 32) ^ (uint32_t)group_high ^ k0;
    const uint64_t p0 = (uint64_t)0xD2511F53u * c0;
    for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      key[round][0] = all(k0), key[round][1] = all(k1);
      if (round == 0) first_high = all(stream ^ k1);
      if (round == 1) second_high = all((uint32_t)p1 ^ k0), first_low = all((uint32_t)(p0 >> 32) ^ k1);
      if (round == 2) key[2][1] = all((uint32_t)p0 ^ k1);
    }
  }

  template <int kVectors> CODEC void vectors(int64_t first, uint16_t* random) const {
    const Lanes m0 = all(0xD2511F53u), m1 = all(0xCD9E8D57u);
    Lanes c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      c3[v] = product(plus(all((uint64_t)first / 8 + v * kLanes), order), m0);
      c1[v] = product(both(high(c3[v]), first_high), m1);
      c2[v] = both(c3[v], first_low);
      c0[v] = both(high(c1[v]), second_high);
    }
    for (int round = 2; round < 6; ++round)
      for (int v = 0; v < kVectors; ++v) {
        const Lanes p0 = product(c0[v], m0), p1 = product(c2[v], m1);
        c0[v] = xor3(high(p1), c1[v], key[round][0]);
        c2[v] = round == 2 ? both(high(p0), key[2][1]) : xor3(high(p0), c3[v], key[round][1]);
        c1[v] = p1;
        c3[v] = p0;
      }
    for (int v = 0; v < kVectors; ++v) {
      const Lanes w01 = last(product(c2[v], m1), c1[v], key[6][0]), w23 = last(product(c0[v], m0), c3[v], key[6][1]);
      save(random + v * 8 * kLanes, evens(w01, w23));
      save(random + v * 8 * kLanes + 4 * kLanes, odds(w01, w23));
    }
  }

  // Writes whole vectors: random has room for kDrawn.
  CODEC void operator()(int64_t first, int64_t count, uint16_t* random) const {
    constexpr int kVectors = kLanes >= 8 ? 4 : 2, kStep = kVectors * kLanes * 8;
    if ((uint64_t)(first + kDrawn) / 8 >> 32 != group_high) {
      for (int64_t i = 0; i < count; ++i) random[i] = (uint16_t)philox16(philox(seed, step, stream, (uint64_t)(first + i) / 8), (int)((first + i) & 7));
      return;
    }
    int64_t at = 0;
    for (; at + kStep <= count; at += kStep) vectors<kVectors>(first + at, random + at);
    for (; at < count; at += 8 * kLanes) vectors<1>(first + at, random + at);
  }
};

// codec/quantize.h, with the code taken from the bits of the sum that rounds: its lowest ones are the integer. Clamping
// integers vectorizes where clamping floats does not. kClamped: to nearest needs none where absmax is `levels` steps:
// |acc * inverse| is then below levels + 1/2.
constexpr float kRounder = 12582912.0f;
struct Code {
  int32_t q;
  float value;
};
template <bool kStochastic, bool kClamped> CODEC Code code_of(float acc, float inverse, int levels, uint16_t random) {
  const int32_t zero = (int32_t)bits_of(kRounder);
  float x = mul(acc, inverse);
  if (!kStochastic) {
    float rounded = add(x, kRounder);
    int32_t q = (int32_t)bits_of(rounded) - zero;
    if (!kClamped) return {q, sub(rounded, kRounder)};
    q = q < levels ? q : levels;
    q = q > -levels ? q : -levels;
    return {q, (float)q};
  }
#if defined(__AVX512F__)
  // The product is exact, so that fused or not the sum is the same.
  int32_t q = (int32_t)__builtin_floorf(__builtin_fmaf((float)(int)random, 1.0f / 65536.0f, x));
#else
  x = add(x, mul((float)(int)random, 1.0f / 65536.0f));
  float rounded = add(x, kRounder);
  int32_t q = (int32_t)bits_of(rounded) - zero - (sub(rounded, kRounder) > x ? 1 : 0);
#endif
  q = q < levels ? q : levels;
  q = q > -levels ? q : -levels;
  return {q, (float)q};
}

// The codes of up to kDrawn elements of one block, from number `first` on, as q + zero in a byte each, and their residual.
template <class X, bool kResidual, bool kStochastic, bool kClamped>
CODEC void quantize_run(const typename X::Stored* __restrict x, float* __restrict residual, const Drawer& draw, BlockScale shared, int levels,
                        int zero, float scale, float unscale, int64_t first, int64_t count, uint8_t* __restrict q) {
  alignas(64) uint16_t random[kDrawn];
  if (kStochastic) draw(first, count, random);
  strips(0, count, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
    prefetch_far<kOddLines>(x + at, count);
    if (kResidual) prefetch_far<kOddLines>(residual + at, count);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      float acc = acc_of<X, kResidual>(x[at + i], residual, at + i, scale);
      Code code = code_of<kStochastic, kClamped>(acc, shared.inverse, levels, kStochastic ? random[at + i] : 0);
      q[at + i] = (uint8_t)(code.q + zero);
      if (kResidual) residual[at + i] = mul(sub(acc, mul(code.value, shared.scale)), unscale);
    }
  });
}

// to <- the codes, 8 / kBits to a byte, the first one lowest. Reads whole bytes' worth.
template <int kBits> CODEC void pack(const uint8_t* __restrict q, int64_t bytes, uint8_t* __restrict to) {
  strips(0, bytes, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      if (kBits == 4) {
        uint16_t pair;
        memcpy(&pair, q + 2 * (at + i), 2);
        to[at + i] = (uint8_t)(pair | pair >> 4);
      } else {
        uint32_t four;
        memcpy(&four, q + 4 * (at + i), 4);
        four |= four >> 6;
        to[at + i] = (uint8_t)(four | four >> 12);
      }
    }
  });
}

// body(first, stop, absmax) for the blocks of [begin, end). The maximum is taken one block ahead, so that nothing waits for
// the way from the lanes to one maximum and through two divisions.
template <class X, bool kResidual, class Body> CODEC void block_by_block(const Input& in, int block, int64_t begin, int64_t end, Body body) {
  const typename X::Stored* x = (const typename X::Stored*)in.x;
  const float scale = *in.loss_scale;
  uint32_t next = absmax_of<X, kResidual>(x, in.residual, scale, begin, least(begin + block, end));
  for (int64_t first = begin; first < end; first += block) {
    const int64_t stop = least(first + block, end);
    const uint32_t absmax = next;
    next = absmax_of<X, kResidual>(x, in.residual, scale, stop, least(stop + block, end));
    body(first, stop, absmax);
  }
}

// The codes, the scale and the residual of one block: its elements first .. stop - 1, of which x is the first.
template <class X, bool kResidual, int kBits, bool kStochastic>
CODEC void encode_block(const QuantEncode& op, const Drawer& draw, const typename X::Stored* x, float scale, float unscale, int64_t first, int64_t stop,
                        uint32_t absmax, float* scales) {
  constexpr int levels = levels_of(kBits), zero = zero_of(kBits), steps = steps_of(levels, kStochastic), per_byte = 8 / kBits;
  const BlockScale shared = block_scale(absmax, steps);
  *scales = shared.scale;
  if (absmax >= kNonFinite) {
    memset(op.codes + first / per_byte, zero * (kBits == 8 ? 1 : kBits == 4 ? 0x11 : 0x55), (size_t)((stop - first + per_byte - 1) / per_byte));
    return;
  }
  for (int64_t at = first; at < stop; at += kDrawn) {
    const int64_t count = least(kDrawn, stop - at);
    auto quantize = [&](uint8_t* q) __attribute__((always_inline)) {
      quantize_run<X, kResidual, kStochastic, steps != levels>(x + (at - first), op.in.residual + at, draw, shared, levels, zero, scale, unscale, at, count, q);
    };
    if (kBits == 8) {
      quantize(op.codes + at);
      continue;
    }
    alignas(64) uint8_t q[kDrawn + 64];
    quantize(q);
    for (int i = 0; i < per_byte - 1; ++i) q[count + i] = zero;  // fills up the last byte
    pack<kBits>(q, (count + per_byte - 1) / per_byte, op.codes + at / per_byte);
  }
}

template <class X, bool kResidual, int kBits, bool kStochastic>
void quant_encode_loop(const QuantEncode& op, int64_t begin, int64_t end) {
  const typename X::Stored* x = (const typename X::Stored*)op.in.x;
  const float scale = *op.in.loss_scale, unscale = divide(1.0f, scale);
  const Drawer draw(op, begin);
  float* scales = op.scales + begin / op.block;
  block_by_block<X, kResidual>(op.in, op.block, begin, end, [&](int64_t first, int64_t stop, uint32_t absmax) __attribute__((always_inline)) {
    encode_block<X, kResidual, kBits, kStochastic>(op, draw, x + first, scale, unscale, first, stop, absmax, scales++);
  });
}

template <int kBits> struct Bits { static constexpr int value = kBits; };
template <class Body> inline void with_bits(int bits, Body body) {
  if (bits == 8) body(Bits<8>());
  else if (bits == 4) body(Bits<4>());
  else body(Bits<2>());
}

void quant_encode(const QuantEncode& op, int64_t begin, int64_t end) {
  with_dtype(op.in.dtype, [&](auto x) {
    with_flag(op.in.residual != nullptr, [&](auto residual) {
      with_flag(op.stochastic, [&](auto stochastic) {
        with_bits(op.bits, [&](auto bits) {
          quant_encode_loop<decltype(x), decltype(residual)::value, decltype(bits)::value, decltype(stochastic)::value>(op, begin, end);
        });
      });
    });
  });
}

constexpr float kFours[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr float kTwos[16] = {-1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2};

// sum[0 .. count - 1] <- decoded codes of one block, or += where they are not the first.
template <int kBits, bool kFirst> CODEC void dequantize_run(const uint8_t* codes, float scale, int64_t count, float* sum) {
  int64_t i = 0;
#if defined(__AVX2__)
  if (kBits == 4) {
    const Sixteen table(kFours, scale);  // rounded like each product with the scale
    for (; i + 16 <= count; i += 16) look_up<kFirst>(table, codes + i / 2, sum + i);
  }
#endif
  // The codes of a byte, a byte each.
  uint16_t pairs[kStrip / 2];
  uint32_t fours[kStrip / 4];
  if (kBits == 4)
    for (int64_t j = i / 2; j < (count + 1) / 2; ++j) pairs[j] = (uint16_t)((codes[j] | codes[j] << 4) & 0x0f0f);
  if (kBits == 2)
    for (int64_t j = i / 4; j < (count + 3) / 4; ++j) {
      const uint32_t twos = codes[j] | (uint32_t)codes[j] << 12;
      fours[j] = (twos | twos << 6) & 0x03030303u;
    }
  const int8_t* q = (const int8_t*)(kBits == 8 ? (const void*)codes : kBits == 4 ? (const void*)pairs : fours);
  constexpr int zero = zero_of(kBits);
  for (; i < count; ++i) {
    const float value = dequantize((float)(q[i] - zero), scale);
    sum[i] = kFirst ? value : add(sum[i], value);
  }
}

#if defined(__AVX2__)
// total <- the codes of one strip of one row, or += where it is not the first.
template <int kBits, bool kFirst, int kVectors> CODEC void dequantize_vectors(const uint8_t* codes, float scale, Floats (&total)[kVectors]) {
  const Sixteen table(kBits == 2 ? kTwos : kFours, scale);
  prefetch_far(codes, 1);
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const uint8_t* from = codes + v * kFloats * kBits / 8;
    const Floats value = kBits == 8 ? times(widened((const int8_t*)from), scale) : looked_up<kBits>(table, from);
    total[v] = kFirst ? value : plus(total[v], value);
  }
}

// sum[0 .. kStrip - 1] <- the codes from `at` on of all rows, added in registers.
template <int kBits> CODEC void dequantize_strip(const QuantDecodeSum& op, int64_t block, int64_t at, float* sum) {
  constexpr int kVectors = kStrip / kFloats;
  Floats total[kVectors];
  const float* scale = op.scales + block;
  const uint8_t* codes = op.codes + at * kBits / 8;
  dequantize_vectors<kBits, true>(codes, *scale, total);
  for (int64_t w = 1; w < op.out.rows; ++w) {
    scale = row(scale, op.out.stride, 1), codes = row(codes, op.out.stride, 1);
    dequantize_vectors<kBits, false>(codes, *scale, total);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) save(sum + v * kFloats, in_order<kBits>(total[v]));
}
#endif

// sum[0 .. count - 1] <- what all rows hold for a strip, from `at` on.
template <int kBits> CODEC void sum_strip(const QuantDecodeSum& op, int64_t block, int64_t at, int64_t count, float* sum) {
  int64_t w = 0;
#if defined(__AVX2__)
  if (count == kStrip) dequantize_strip<kBits>(op, block, at, sum), w = op.out.rows;
#endif
  for (; w < op.out.rows; ++w) {
    const float scale = row(op.scales, op.out.stride, w)[block];
    const uint8_t* codes = row(op.codes, op.out.stride, w) + at * kBits / 8;
    prefetch_far(codes, 1);
    if (w == 0) dequantize_run<kBits, true>(codes, scale, count, sum);
    else dequantize_run<kBits, false>(codes, scale, count, sum);
  }
}

template <class Out, int kBits> void quant_decode_loop(const QuantDecodeSum& op, int64_t begin, int64_t end) {
  typename Out::Stored* __restrict out = (typename Out::Stored*)op.out.out;
  for (int64_t block = begin / op.block; block * op.block < end; ++block) {
    strips(block * op.block, least(end, (block + 1) * op.block), [&](int64_t at, int64_t count) __attribute__((always_inline)) {
      alignas(64) float sum[kStrip];
      sum_strip<kBits>(op, block, at, count, sum);
      for (int64_t i = 0; i < count; ++i) out[at + i] = Out::store(mul(sum[i], op.out.weight));
    });
  }
}

void quant_decode_sum(const QuantDecodeSum& op, int64_t begin, int64_t end) {
  with_dtype(op.out.dtype, [&](auto out) {
    with_bits(op.bits, [&](auto bits) { quant_decode_loop<decltype(out), decltype(bits)::value>(op, begin, end); });
  });
}

// The total of a block stays in the nearest cache that holds it. As in block_by_block the next block is summed before one is
// encoded.
template <bool kResidual, int kBits, bool kStochastic>
void quant_resum_loop(const QuantResum& op, float* totals, int64_t begin, int64_t end) {
  const int64_t block = op.to.block;
  const float scale = *op.to.in.loss_scale, unscale = divide(1.0f, scale);
  const Drawer draw(op.to, begin);
  auto total_of = [&](int64_t number) __attribute__((always_inline)) { return totals + (number & 1 ? block : 0); };
  auto summed = [&](int64_t number) __attribute__((always_inline)) {
    const int64_t first = number * block, stop = least(first + block, end);
    float* total = total_of(number);
    strips(first, stop, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
      alignas(64) float sum[kStrip];  // no row can lie in it, so that the compiler may hold it in registers
      sum_strip<kBits>(op.from, number, at, count, sum);
      memcpy(total + (at - first), sum, (size_t)count * 4);
    });
    return absmax_of<F32, kResidual>(total, op.to.in.residual + first, scale, 0, stop - first);
  };
  uint32_t next = summed(begin / block);
  for (int64_t number = begin / block; number * block < end; ++number) {
    const int64_t first = number * block, stop = least(first + block, end);
    const uint32_t absmax = next;
    if (stop < end) next = summed(number + 1);
    encode_block<F32, kResidual, kBits, kStochastic>(op.to, draw, total_of(number), scale, unscale, first, stop, absmax, op.to.scales + number);
  }
}

void quant_resum(const QuantResum& op, float* totals, int64_t begin, int64_t end) {
  with_flag(op.to.in.residual != nullptr, [&](auto residual) {
    with_flag(op.to.stochastic, [&](auto stochastic) {
      with_bits(op.to.bits, [&](auto bits) {
        quant_resum_loop<decltype(residual)::value, decltype(bits)::value, decltype(stochastic)::value>(op, totals, begin, end);
      });
    });
  });
}

}  // namespace
