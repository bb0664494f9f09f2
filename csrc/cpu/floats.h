// Small floats that share a scale per block.
#pragma once
#include "../codec/floats.h"
#include "quant.h"

namespace {

using commopt::AbsMax;
using commopt::FloatDecodeSum;
using commopt::FloatEncode;

template <class Body> inline void with_element(int element, Body body) {
  if (element == commopt::kE4M3) body(E4M3());
  else if (element == commopt::kE5M2) body(E5M2());
  else if (element == commopt::kE2M1) body(E2M1());
  else body(Power());
}

// acc of up to kDrawn elements, and the largest magnitude among them. A function for each kind of gradient, so that what
// comes after is there once for all of them.
using Load = uint32_t (*)(const commopt::Input& in, int64_t first, int64_t count, float* acc);

template <class X, bool kResidual> uint32_t load_acc(const commopt::Input& in, int64_t first, int64_t count, float* __restrict acc) {
  const typename X::Stored* __restrict x = (const typename X::Stored*)in.x + first;
  const float* __restrict residual = kResidual ? in.residual + first : nullptr;
  const float scale = *in.loss_scale;
  int32_t lanes[kStrip] = {}, most = 0;
  strips(0, count, [&](int64_t at, int64_t strip) __attribute__((always_inline)) {
    prefetch_far<kEvenLines>(x + at, strip, kAhead * 3 / 4);
    if (kResidual) prefetch_far<kEvenLines>(residual + at, strip, kAhead * 3 / 4);
    for (int64_t i = 0; i < strip; ++i) {
      const float value = acc_of<X, kResidual>(x[at + i], residual, at + i, scale);
      const int32_t m = (int32_t)magnitude(value);
      acc[at + i] = value;
      lanes[i] = m > lanes[i] ? m : lanes[i];
    }
  });
  for (int64_t i = 0; i < kStrip; ++i) most = lanes[i] > most ? lanes[i] : most;
  return (uint32_t)most;
}

// What load() does not fetch of what lies ahead.
CODEC void prefetch_rest(const commopt::Input& in, int64_t first, int64_t count) {
  if (in.dtype == commopt::kFloat32) prefetch_far<kOddLines>((const float*)in.x + first, count);
  else prefetch_far<kOddLines>((const uint16_t*)in.x + first, count);
  if (in.residual) prefetch_far<kOddLines>(in.residual + first, count);
}

inline Load loader(const commopt::Input& in) {
  Load load = nullptr;
  with_dtype(in.dtype, [&](auto x) {
    with_flag(in.residual != nullptr, [&](auto residual) { load = load_acc<decltype(x), decltype(residual)::value>; });
  });
  return load;
}

// The largest magnitude in [begin, end), and in acc the last kDrawn elements or fewer.
CODEC uint32_t load_all(Load load, const commopt::Input& in, int64_t begin, int64_t end, float* acc) {
  uint32_t most = 0;
  for (int64_t at = begin; at < end; at += kDrawn) {
    const uint32_t m = load(in, at, least(kDrawn, end - at), acc);
    most = m > most ? m : most;
  }
  return most;
}

uint32_t absmax(const AbsMax& op, int64_t begin, int64_t end) {
  uint32_t most = 0;
  with_dtype(op.in.dtype, [&](auto x) {
    with_flag(op.in.residual != nullptr, [&](auto residual) {
      using X = decltype(x);
      most = absmax_of<X, decltype(residual)::value, kEveryLine>((const typename X::Stored*)op.in.x, op.in.residual, *op.in.loss_scale, begin, end);
    });
  });
  return most;
}

// Scale of a block, and its place in the message.
template <class E> struct Scales {
  const FloatEncode& op;
  float whole;

  explicit Scales(const FloatEncode& op) : op(op), whole(op.whole ? *op.whole : 0.0f) {}

  CODEC SharedScale operator()(uint32_t absmax, int64_t block) const {
    if (op.scaling == commopt::kScaleFloat32) {
      const SharedScale shared = float32_scale<E>(absmax);
      ((float*)op.scales)[block] = shared.scale;
      return shared;
    }
    const SharedScale shared = op.scaling == commopt::kScaleE8M0 ? e8m0_scale<E>(absmax) : e4m3_scale<E>(absmax, whole);
    ((uint8_t*)op.scales)[block] = (uint8_t)shared.code;
    return shared;
  }

  // The same for several blocks from `block` on, one loop for each kind of scale.
  template <int kBlocks> CODEC void several(const int32_t* __restrict absmax, int64_t block, float* __restrict scale, float* __restrict inverse) const {
    uint8_t codes[kBlocks];
    auto each = [&](auto scale_of) __attribute__((always_inline)) {
      for (int b = 0; b < kBlocks; ++b) {
        const SharedScale shared = scale_of((uint32_t)absmax[b]);
        scale[b] = shared.scale;
        inverse[b] = shared.inverse;
        codes[b] = (uint8_t)shared.code;
      }
    };
    if (op.scaling == commopt::kScaleFloat32) {
      each([](uint32_t m) __attribute__((always_inline)) { return float32_scale<E>(m); });
      memcpy((float*)op.scales + block, scale, kBlocks * 4);
      return;
    }
    if (op.scaling == commopt::kScaleE8M0) each([](uint32_t m) __attribute__((always_inline)) { return e8m0_scale<E>(m); });
    else each([&](uint32_t m) __attribute__((always_inline)) { return e4m3_scale<E>(m, whole); });
    memcpy((uint8_t*)op.scales + block, codes, kBlocks);
  }
};

// q, and what is left of acc, for a run of elements that share a scale.
template <class E, bool kResidual, bool kStochastic>
CODEC void encode_run(const float* __restrict acc, int64_t count, const BlockScale& shared, float unscale, const uint16_t* __restrict random,
                      uint8_t* __restrict q, float* __restrict residual) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = mul(acc[i], shared.inverse);
    const Small sent = kStochastic ? to_small_stochastic<E>(scaled, random[i]) : to_small<E>(scaled);
    q[i] = (uint8_t)sent.code;
    if (kResidual) residual[i] = mul(sub(acc[i], mul(sent.value, shared.scale)), unscale);
  }
}

// Where `count` codes of one byte each, in q, belong: two to a byte if they have 4 bits. q has room for one more.
template <class E> CODEC void store_codes(uint8_t* q, int64_t count, uint8_t* codes) {
  if (E::kBits == 8) return;
  q[count] = 0;  // the partner of the last, where that is even
  strips(0, (count + 1) / 2, [&](int64_t at, int64_t pairs) __attribute__((always_inline)) {
#pragma GCC ivdep
    for (int64_t i = 0; i < pairs; ++i) {
      uint16_t pair;
      memcpy(&pair, q + 2 * (at + i), 2);
      codes[at + i] = (uint8_t)(pair | pair >> 4);
    }
  });
}

// Short blocks, kDrawn elements of them at a time: what there is to encode, then all scales, then all codes, those of
// several blocks in one loop, because the loop over one would have narrow vectors. Returns the first element that is left over.
template <class E, bool kResidual, int kBlock> int64_t encode_short(const FloatEncode& op, Load load, int64_t begin, int64_t end) {
  constexpr int kBlocks = kDrawn / kBlock;
  const float unscale = divide(1.0f, *op.in.loss_scale);
  const Scales<E> scales(op);
  alignas(64) float acc[kDrawn];
  alignas(64) uint8_t nibbles[kDrawn + 64];
  alignas(64) int32_t most[kBlocks];
  alignas(64) float scale[kBlocks], inverse[kBlocks];
  for (; begin + kDrawn <= end; begin += kDrawn) {
    load(op.in, begin, kDrawn, acc);
    for (int b = 0; b < kBlocks; ++b) {
      most[b] = 0;
      for (int i = 0; i < kBlock; ++i) {
        const int32_t m = (int32_t)magnitude(acc[b * kBlock + i]);
        most[b] = m > most[b] ? m : most[b];
      }
    }
    scales.template several<kBlocks>(most, begin / kBlock, scale, inverse);
    uint8_t* q = E::kBits == 8 ? op.codes + begin : nibbles;
    for (int at = 0; at < kDrawn; at += kStrip) {
      prefetch_rest(op.in, begin + at, kStrip);
      alignas(64) float scale_of[kStrip], inverse_of[kStrip];
      bool finite = true;
      for (int i = 0; i < kStrip; i += kBlock) {
        const float s = scale[(at + i) / kBlock], inverted = inverse[(at + i) / kBlock];
        for (int e = 0; e < kBlock; ++e) scale_of[i + e] = s, inverse_of[i + e] = inverted;
        finite &= magnitude(s) < kNonFinite;
      }
      if (finite) {
        float* __restrict residual = op.in.residual + begin + at;
#pragma GCC ivdep
        for (int i = 0; i < kStrip; ++i) {
          const Small sent = to_small<E>(mul(acc[at + i], inverse_of[i]));
          q[at + i] = (uint8_t)sent.code;
          if (kResidual) residual[i] = mul(sub(acc[at + i], mul(sent.value, scale_of[i])), unscale);
        }
        continue;
      }
      for (int i = at; i < at + kStrip; i += kBlock) {
        const BlockScale shared{scale[i / kBlock], inverse[i / kBlock]};
        if (magnitude(shared.scale) >= kNonFinite) memset(q + i, 0, kBlock);
        else encode_run<E, kResidual, false>(acc + i, kBlock, shared, unscale, nullptr, q + i, op.in.residual + begin + i);
      }
    }
    store_codes<E>(q, kDrawn, op.codes + begin / 2);
  }
  return begin;
}

template <class E, bool kResidual, bool kStochastic> void float_encode_loop(const FloatEncode& op, int64_t begin, int64_t end) {
  const Load load = loader(op.in);
  if constexpr (!kStochastic && E::kMantissa > 0)
    if (op.block == 32) begin = encode_short<E, kResidual, 32>(op, load, begin, end);
  if constexpr (!kStochastic && E::kBits == 4)
    if (op.block == 16) begin = encode_short<E, kResidual, 16>(op, load, begin, end);
  if (begin >= end) return;
  const float unscale = divide(1.0f, *op.in.loss_scale);
  const Scales<E> scales(op);
  QuantEncode keyed{};
  keyed.seed = op.seed, keyed.step = op.step, keyed.stream = op.stream;
  const Drawer draw(keyed, begin);
  alignas(64) float held[2][kDrawn];
  alignas(64) uint16_t random[kDrawn];
  alignas(64) uint8_t nibbles[kDrawn + 64];
  // One block ahead, so that nothing waits for the way from the lanes to one maximum and through two divisions.
  uint32_t next = load_all(load, op.in, begin, least(begin + op.block, end), held[0]);
  for (int64_t first = begin, turn = 0; first < end; first += op.block, ++turn) {
    const int64_t stop = least(first + op.block, end);
    const SharedScale shared = scales(next, first / op.block);
    next = load_all(load, op.in, stop, least(stop + op.block, end), held[(turn + 1) % 2]);
    float* acc = held[turn % 2];
    if (magnitude(shared.scale) >= kNonFinite) {
      if (E::kBits == 8) memset(op.codes + first, 0, (size_t)(stop - first));
      else memset(op.codes + first / 2, 0, (size_t)(stop - first + 1) / 2);
      continue;
    }
    for (int64_t at = first; at < stop; at += kDrawn) {
      const int64_t count = least(kDrawn, stop - at);
      if (op.block > kDrawn) load(op.in, at, count, acc);
      if (kStochastic) draw(at, count, random);
      uint8_t* q = E::kBits == 8 ? op.codes + at : nibbles;
      strips(0, count, [&](int64_t i, int64_t strip) __attribute__((always_inline)) {
        prefetch_rest(op.in, at + i, strip);
        encode_run<E, kResidual, kStochastic>(acc + i, strip, shared, unscale, random + i, q + i, op.in.residual + at + i);
      });
      store_codes<E>(q, count, op.codes + at / 2);
    }
  }
}

void float_encode(const FloatEncode& op, int64_t begin, int64_t end) {
  with_flag(op.in.residual != nullptr, [&](auto residual) {
    with_flag(op.stochastic, [&](auto stochastic) {
      with_element(op.element, [&](auto element) {
        float_encode_loop<decltype(element), decltype(residual)::value, decltype(stochastic)::value>(op, begin, end);
      });
    });
  });
}

// The scales of a row's blocks from `block` on.
CODEC void scales_of(const FloatDecodeSum& op, int64_t w, int64_t block, int64_t blocks, float* scales) {
  const char* from = (const char*)op.scales + op.out.stride * w;
  if (op.scaling == commopt::kScaleFloat32) {
    memcpy(scales, from + 4 * block, (size_t)blocks * 4);
  } else if (op.scaling == commopt::kScaleE8M0) {
    for (int64_t b = 0; b < blocks; ++b) scales[b] = from_e8m0((uint8_t)from[block + b]);
  } else {
    const float whole = *row(op.whole, op.out.stride, w);
    for (int64_t b = 0; b < blocks; ++b) scales[b] = mul(from_small<E4M3>((uint8_t)from[block + b]), whole);
  }
}

// sum[0 .. count - 1] <- decoded codes of one block, or += where they are not the first.
template <class E, bool kFirst> CODEC void float_decode_run(const uint8_t* codes, float scale, int64_t count, float* sum) {
  int64_t i = 0;
#if defined(__AVX2__)
  if (E::kBits == 4) {
    static constexpr float kCodes[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
    const Sixteen table(kCodes, scale);  // rounded like each product with the scale
    for (; i + 16 <= count; i += 16) look_up<kFirst>(table, codes + i / 2, sum + i);
  }
#endif
  uint16_t pairs[kStrip / 2 + 1];
  if (E::kBits == 4)
    for (int64_t j = i / 2; j < (count + 1) / 2; ++j) pairs[j] = (uint16_t)((codes[j] | codes[j] << 4) & 0x0f0f);
  const uint8_t* q = E::kBits == 8 ? codes : (const uint8_t*)pairs;
  for (; i < count; ++i) {
    const float value = mul(from_small<E>(q[i]), scale);
    sum[i] = kFirst ? value : add(sum[i], value);
  }
}

// The same for kDrawn elements in short blocks, where a loop whose length is a constant saves most.
template <class E, bool kFirst, int kBlock> CODEC void float_decode_short(const uint8_t* codes, const float* scales, float* sum) {
  for (int b = 0; b < kDrawn / kBlock; ++b)
    float_decode_run<E, kFirst>(codes + b * kBlock * E::kBits / 8, scales[b], kBlock, sum + b * kBlock);
}

// And for up to kDrawn elements of row w from `at` on.
template <class E, bool kFirst> CODEC void float_decode_row(const FloatDecodeSum& op, int64_t w, int64_t at, int64_t count, float* sum) {
  const uint8_t* codes = row(op.codes, op.out.stride, w) + at * E::kBits / 8;
  const int64_t first = at / op.block;
  float scales[kDrawn / 8 + 1];
  prefetch_far(codes, count * E::kBits / 8, kAhead / 4);
  scales_of(op, w, first, (at + count - 1) / op.block - first + 1, scales);
  if (op.block == 32 && count == kDrawn) return float_decode_short<E, kFirst, 32>(codes, scales, sum);
  if (E::kBits == 4 && op.block == 16 && count == kDrawn) return float_decode_short<E, kFirst, 16>(codes, scales, sum);
  for (int64_t block = first, i = 0; i < count; ++block) {
    const int64_t stop = least(count, (block + 1) * op.block - at);
    strips(i, stop, [&](int64_t from, int64_t strip) __attribute__((always_inline)) {
      float_decode_run<E, kFirst>(codes + from * E::kBits / 8, scales[block - first], strip, sum + from);
    });
    i = stop;
  }
}

template <class E> void float_decode_rows(const FloatDecodeSum& op, int64_t at, int64_t count, float* sum) {
  float_decode_row<E, true>(op, 0, at, count, sum);
  for (int64_t w = 1; w < op.out.rows; ++w) float_decode_row<E, false>(op, w, at, count, sum);
}

void float_decode_sum(const FloatDecodeSum& op, int64_t begin, int64_t end) {
  void (*rows)(const FloatDecodeSum&, int64_t at, int64_t count, float* sum) = nullptr;
  with_element(op.element, [&](auto element) { rows = float_decode_rows<decltype(element)>; });
  with_dtype(op.out.dtype, [&](auto dtype) {
    using Out = decltype(dtype);
    typename Out::Stored* __restrict out = (typename Out::Stored*)op.out.out;
    alignas(64) float sum[kDrawn];
    for (int64_t first = begin; first < end; first += kDrawn) {
      rows(op, first, least(kDrawn, end - first), sum);
      strips(0, least(kDrawn, end - first), [&](int64_t at, int64_t count) __attribute__((always_inline)) {
        for (int64_t i = at; i < at + count; ++i) out[first + i] = Out::store(mul(sum[i], op.out.weight));
      });
    }
  });
}

}  // namespace
