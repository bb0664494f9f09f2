// Small floats that share a scale per block: one value to a code and back, and the scales. By integer arithmetic and sums
// that are exact, never by the hardware's conversions, of which each has another idea of what is too large.
#pragma once
#include "quantize.h"

namespace {

// kMantissa: bits. kLeast: exponent of the smallest normal value. kMost: bits of the largest value as a float32; what is
// larger becomes this. kTop: a scale that is a power of two brings the block's largest magnitude into [2^kTop, 2^(kTop + 1)).
struct E4M3 {  // no infinity; 0x7f and 0xff are NaN
  static constexpr int kBits = 8, kMantissa = 3, kLeast = -6, kTop = 8;
  static constexpr uint32_t kMost = 0x43e00000u;
};
struct E5M2 {  // from 0x7c on infinity and NaN
  static constexpr int kBits = 8, kMantissa = 2, kLeast = -14, kTop = 15;
  static constexpr uint32_t kMost = 0x47600000u;
};
struct E2M1 {
  static constexpr int kBits = 4, kMantissa = 1, kLeast = 0, kTop = 2;
  static constexpr uint32_t kMost = 0x40c00000u;
};
struct Power {  // 2^(code - 127), code 0 is zero; rounding up may double the largest
  static constexpr int kBits = 8, kMantissa = 0, kLeast = -126, kTop = -1;
  static constexpr uint32_t kMost = 0x3f800000u;
};

template <class E> constexpr uint32_t kLeastBits = (uint32_t)(127 + E::kLeast) << 23;

struct Small {
  uint32_t code;
  float value;
};

// The magnitude, at most the largest value, and the power of two below it from which the spacing follows. Signed, because
// instruction sets without an unsigned comparison are slow at one.
struct Binade {
  uint32_t size, exponent;
};
template <class E> CODEC Binade binade(float x) {
  int32_t size = (int32_t)magnitude(x);
  size = size < (int32_t)E::kMost ? size : (int32_t)E::kMost;
  int32_t exponent = size & 0x7f800000;
  exponent = exponent > (int32_t)kLeastBits<E> ? exponent : (int32_t)kLeastBits<E>;
  return {(uint32_t)size, (uint32_t)exponent};
}

// q spacings above 0 in this binade, which are `value`, with the sign of x.
template <class E> CODEC Small small(uint32_t q, float value, uint32_t exponent, float x) {
  uint32_t sign = bits_of(x) & 0x80000000u;
  uint32_t code = q + ((exponent - kLeastBits<E>) >> (23 - E::kMantissa));
  return {code | sign >> (32 - E::kBits), float_of(bits_of(value) | sign)};
}

// To nearest, ties to even: a sum with the power of two whose last bit is one spacing leaves q in its lowest bits.
template <class E> CODEC Small to_small(float x) {
  Binade b = binade<E>(x);
  uint32_t rounder = b.exponent + ((uint32_t)(23 - E::kMantissa) << 23);
  float sum = add(float_of(b.size), float_of(rounder));
  return small<E>(bits_of(sum) - rounder, sub(sum, float_of(rounder)), b.exponent, x);
}

// Up with the probability of the fraction, which counts in 2^-17: unbiased to that part of a spacing.
template <class E> CODEC Small to_small_stochastic(float x, uint32_t random16) {
  Binade b = binade<E>(x);
  float spacings = mul(float_of(b.size), float_of(0x7f000000u - b.exponent));  // times 2^-exponent: in [0, 2)
  int32_t fixed = (int32_t)mul(spacings, float_of((uint32_t)(127 + 17 + E::kMantissa) << 23));
  int32_t q = (fixed + (int32_t)(2 * random16 + 1)) >> 17;
  float value = mul((float)q, float_of(b.exponent - ((uint32_t)E::kMantissa << 23)));
  return small<E>((uint32_t)q, value, b.exponent, x);
}

template <class E> CODEC float from_small(uint32_t code) {
  constexpr uint32_t rest = ((1u << (E::kBits - 1)) - 1) << (23 - E::kMantissa);
  uint32_t top = code << (32 - E::kBits);
  int32_t bits = (int32_t)(top >> (9 - E::kBits + E::kMantissa) & rest), nan = (int32_t)kNaN;
  bool special = E::kMantissa == 3 ? bits == 0x07f00000 : E::kMantissa == 2 && bits >= 0x0f800000;
  if (E::kMantissa == 2) nan = bits | 0x7f800000;
  if (E::kMantissa > 0) {
    // As if there were a leading one below the normal values too, and twice that less what a leading one is worth there.
    // The smaller is right: below the normal values the second, from them on the first.
    float one = float_of((uint32_t)bits + kLeastBits<E> - (1u << 23));
    int32_t none = (int32_t)bits_of(sub(add(one, one), float_of(kLeastBits<E>)));
    bits = (int32_t)bits_of(one);
    bits = bits < none ? bits : none;
  }
  bits = special ? nan : bits;
  return float_of((uint32_t)bits | (top & 0x80000000u));
}

// --- scales ---

struct SharedScale : BlockScale {
  uint32_t code;  // of a scale that travels in a byte
};

// e8m0: c stands for 2^(c - 127), 0xff for NaN.
CODEC float from_e8m0(uint32_t code) {
  uint32_t power = code ? code << 23 : 0x00400000u;
  return float_of(code == 0xffu ? kNaN : power);
}

// 2^(floor(log2 absmax) - kTop), within the range of e8m0: section 6.3 of the OCP Microscaling Formats (MX) specification.
template <class E> CODEC SharedScale e8m0_scale(uint32_t absmax) {
  int code = (int)(absmax >> 23) - E::kTop;
  code = code > 0 ? code : 0;
  code = code < 254 ? code : 254;
  float inverse = from_e8m0((uint32_t)(254 - code));
  bool finite = absmax < kNonFinite;
  if (!finite) code = 0xff;
  return {{from_e8m0((uint32_t)code), finite ? inverse : 0.0f}, (uint32_t)code};
}

template <class E> CODEC SharedScale float32_scale(uint32_t absmax) { return {block_scale(absmax, float_of(E::kMost)), 0}; }

// whole: what the e4m3 scale is multiplied with.
template <class E> CODEC SharedScale e4m3_scale(uint32_t absmax, float whole) {
  bool finite = ((int32_t)absmax < (int32_t)kNonFinite) & ((int32_t)magnitude(whole) < (int32_t)kNonFinite);
  float quotient = divide(divide(float_of(absmax), float_of(E::kMost)), whole);
  Small ratio = to_small<E4M3>(whole > 0.0f ? quotient : 0.0f);
  float scale = mul(ratio.value, whole), inverse = divide(1.0f, scale);
  bool usable = finite & (scale > 0.0f) & ((int32_t)magnitude(inverse) < (int32_t)kNonFinite);
  return {{finite ? scale : float_of(kNaN), usable ? inverse : 0.0f}, finite ? ratio.code : 0x7fu};
}

}  // namespace
