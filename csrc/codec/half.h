// float32 to and from the two 16-bit formats by integer arithmetic, round to nearest, ties to even.
// Written out because the compiler's _Float16 is slow without AVX-512 and pulls in a newer C library.
#pragma once
#include "bits.h"

namespace {

CODEC float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }

CODEC uint16_t to_bf16(float x) {
  uint32_t u = bits_of(x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  uint32_t nan = (u >> 16) | 0x40u;  // quiet, and never rounded up to infinity
  return (uint16_t)((u & 0x7fffffffu) > kNonFinite ? nan : rounded);
}

CODEC float from_fp16(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = (uint32_t)(h & 0x7fffu);
  // Placed one exponent field lower than in float32, a product with 2^112 puts every normal and denormal value right.
  uint32_t finite = bits_of(mul(float_of(rest << 13), float_of(0x77800000u)));
  uint32_t special = (rest << 13) | 0x7f800000u;
  return float_of(sign | (rest >= 0x7c00u ? special : finite));
}

CODEC uint16_t to_fp16(float x) {
  uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, m = u & 0x7fffffffu;
  uint32_t normal = (m - 0x38000000u + 0xfffu + ((m >> 13) & 1u)) >> 13;
  // Below 2^-14 the spacing is fixed: adding 0.5 leaves exactly the bits that a denormal keeps, rounded by the adder.
  uint32_t denormal = bits_of(add(float_of(m), 0.5f)) - 0x3f000000u;
  uint32_t finite = m < 0x38800000u ? denormal : normal;
  uint32_t special = m > kNonFinite ? 0x7e00u : 0x7c00u;
  return (uint16_t)(sign | (m >= 0x477ff000u ? special : finite));
}

}  // namespace
