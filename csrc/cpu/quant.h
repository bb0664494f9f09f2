// Integer codes of 8 or 4 bits that share a scale per block.
#pragma once
#include "../codec/quantize.h"
#include "half.h"
#include "lanes.h"
#include "values.h"

namespace {

using commopt::QuantDecodeSum;
using commopt::QuantEncode;

// codec/philox.h for a strip of elements that begins at a multiple of 8. A counter word sits in the low half of a lane and
// the high half is left as it falls: the next product ignores it. Lanes are in the order that makes evens() come first.
struct Drawer {
  Lanes key[7][2], order, step, stream;

  explicit Drawer(const QuantEncode& op) : step(all(op.step)), stream(all(op.stream)) {
    uint64_t lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = (uint64_t)(lane / 2 + (lane & 1) * (kLanes / 2));
    order = load(lanes);
    for (uint32_t round = 0; round < 7; ++round) {
      key[round][0] = all((uint32_t)op.seed + round * 0x9E3779B9u);
      key[round][1] = all((uint32_t)(op.seed >> 32) + round * 0xBB67AE85u);
    }
  }

  CODEC void operator()(int64_t first, uint16_t* random) const {
    const Lanes m0 = all(0xD2511F53u), m1 = all(0xCD9E8D57u);
    for (int at = 0; at < (int)kStrip; at += 8 * kLanes) {
      const Lanes group = plus(all((uint64_t)(first + at) / 8), order);
      Lanes c0 = group, c1 = high(group), c2 = step, c3 = stream;
      for (int round = 0; round < 7; ++round) {
        const Lanes p0 = product(c0, m0), p1 = product(c2, m1);
        c0 = xor3(high(p1), c1, key[round][0]);
        c2 = xor3(high(p0), c3, key[round][1]);
        c1 = p1;
        c3 = p0;
      }
      const Lanes w01 = joined(c0, c1), w23 = joined(c2, c3);
      save(random + at, evens(w01, w23));
      save(random + at + 4 * kLanes, odds(w01, w23));
    }
  }
};

// codec/quantize.h, with the code taken from the bits of the sum that rounds: its lowest ones are the integer. Clamping
// integers vectorizes where clamping floats does not. To nearest needs none: |acc * inverse| is below levels + 1/2.
constexpr float kRounder = 12582912.0f;
struct Code {
  int32_t q;
  float value;
};
template <bool kStochastic> CODEC Code code_of(float acc, float inverse, int levels, uint16_t random) {
  const int32_t zero = (int32_t)bits_of(kRounder);
  float x = mul(acc, inverse);
  if (!kStochastic) {
    float rounded = add(x, kRounder);
    return {(int32_t)bits_of(rounded) - zero, sub(rounded, kRounder)};
  }
  x = add(x, mul((float)(int)random, 1.0f / 65536.0f));
  float rounded = add(x, kRounder);
  int32_t q = (int32_t)bits_of(rounded) - zero - (sub(rounded, kRounder) > x ? 1 : 0);
  q = q < levels ? q : levels;
  q = q > -levels ? q : -levels;
  return {q, (float)q};
}

template <class X, bool kResidual, int kBits, bool kStochastic>
void quant_encode_loop(const QuantEncode& op, int64_t begin, int64_t end) {
  constexpr int levels = kBits == 8 ? 127 : 7;
  const typename X::Stored* __restrict x = (const typename X::Stored*)op.in.x;
  float* __restrict residual = op.in.residual;
  uint8_t* __restrict codes = op.codes;
  const float scale = *op.in.loss_scale, unscale = divide(1.0f, scale);
  const Drawer draw(op);
  for (int64_t first = begin; first < end; first += op.block) {
    const int64_t stop = least(first + op.block, end);
    const uint32_t absmax = absmax_of<X, kResidual>(x, residual, scale, first, stop);
    const BlockScale shared = block_scale(absmax, levels);
    op.scales[first / op.block] = shared.scale;
    if (absmax >= kNonFinite) {
      if (kBits == 8) memset(codes + first, 0, (size_t)(stop - first));
      else memset(codes + first / 2, 0x88, (size_t)(stop - first + 1) / 2);
      continue;
    }
    strips(first, stop, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
      uint16_t random[kStrip];
      if (kStochastic) draw(at, random);
      uint8_t q[kStrip + 1];
      for (int64_t i = 0; i < count; ++i) {
        float acc = acc_of<X, kResidual>(x[at + i], residual, at + i, scale);
        Code code = code_of<kStochastic>(acc, shared.inverse, levels, kStochastic ? random[i] : 0);
        if (kBits == 8) codes[at + i] = (uint8_t)code.q;
        else q[i] = (uint8_t)(code.q + 8);
        if (kResidual) residual[at + i] = mul(sub(acc, mul(code.value, shared.scale)), unscale);
      }
      if (kBits == 4) {
        q[count] = 8;  // the partner of the last, where that is even
        for (int64_t i = 0; i < (count + 1) / 2; ++i) {
          uint16_t pair;
          memcpy(&pair, q + 2 * i, 2);
          codes[at / 2 + i] = (uint8_t)(pair | pair >> 4);
        }
      }
    });
  }
}

void quant_encode(const QuantEncode& op, int64_t begin, int64_t end) {
  with_dtype(op.in.dtype, [&](auto x) {
    with_flag(op.in.residual != nullptr, [&](auto residual) {
      with_flag(op.stochastic, [&](auto stochastic) {
        if (op.bits == 8) quant_encode_loop<decltype(x), decltype(residual)::value, 8, decltype(stochastic)::value>(op, begin, end);
        else quant_encode_loop<decltype(x), decltype(residual)::value, 4, decltype(stochastic)::value>(op, begin, end);
      });
    });
  });
}

template <class Out, int kBits> void quant_decode_loop(const QuantDecodeSum& op, int64_t begin, int64_t end) {
  typename Out::Stored* __restrict out = (typename Out::Stored*)op.out.out;
  for (int64_t block = begin / op.block; block * op.block < end; ++block) {
    strips(block * op.block, least(end, (block + 1) * op.block), [&](int64_t at, int64_t count) __attribute__((always_inline)) {
      float sum[kStrip];
      for (int64_t w = 0; w < op.out.rows; ++w) {
        const float scale = row(op.scales, op.out.stride, w)[block];
        const uint8_t* __restrict codes = row(op.codes, op.out.stride, w) + (kBits == 8 ? at : at / 2);
        prefetch(codes, 1);
        uint16_t pairs[kStrip / 2 + 1];
        if (kBits == 4)
          for (int64_t i = 0; i < (count + 1) / 2; ++i) pairs[i] = (uint16_t)((codes[i] | codes[i] << 4) & 0x0f0f);
        const int8_t* q = (const int8_t*)(kBits == 8 ? (const void*)codes : pairs);
        constexpr int zero = kBits == 8 ? 0 : 8;
        if (w == 0)
          for (int64_t i = 0; i < count; ++i) sum[i] = dequantize((float)(q[i] - zero), scale);
        else
          for (int64_t i = 0; i < count; ++i) sum[i] = add(sum[i], dequantize((float)(q[i] - zero), scale));
      }
      for (int64_t i = 0; i < count; ++i) out[at + i] = Out::store(mul(sum[i], op.out.weight));
    });
  }
}

void quant_decode_sum(const QuantDecodeSum& op, int64_t begin, int64_t end) {
  with_dtype(op.out.dtype, [&](auto out) {
    if (op.bits == 8) quant_decode_loop<decltype(out), 8>(op, begin, end);
    else quant_decode_loop<decltype(out), 4>(op, begin, end);
  });
}

}  // namespace
