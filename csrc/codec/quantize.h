// One value of a block to an integer code and back. A block shares the scale absmax / steps.
#pragma once
#include "bits.h"

namespace {

// Codes of fewer than 8 bits are stored as q + zero_of(bits).
CODEC constexpr int levels_of(int bits) { return bits == 8 ? 127 : bits == 4 ? 7 : 1; }
CODEC constexpr int zero_of(int bits) { return bits == 8 ? 0 : bits == 4 ? 8 : 1; }

// How many steps absmax is. With one level to nearest it is 2: what is larger saturates, but far less rounds to zero.
CODEC constexpr int steps_of(int levels, bool stochastic) { return levels == 1 && !stochastic ? 2 : levels; }

// scale: what one step is worth. inverse: its reciprocal, or 0 where that would be infinite; the codes are then 0
// and the residual keeps everything. A block with an infinity or a NaN gets a NaN scale and is seen by every rank.
struct BlockScale {
  float scale, inverse;
};

CODEC BlockScale block_scale(uint32_t absmax, float steps) {
  if (absmax >= kNonFinite) return {float_of(kNaN), 0.0f};
  float scale = divide(float_of(absmax), steps);
  float inverse = scale > 0.0f ? divide(1.0f, scale) : 0.0f;
  return {scale, magnitude(inverse) >= kNonFinite ? 0.0f : inverse};
}

CODEC float clamp(float q, float levels) { return q > levels ? levels : (q < -levels ? -levels : q); }

// Round to nearest, ties to even: 1.5 * 2^23 leaves no fraction bits. Right for |x| < 2^22, and here |x| <= 127.
CODEC float nearest(float x) { return sub(add(x, 12582912.0f), 12582912.0f); }

CODEC float quantize(float acc, float inverse, float levels) { return clamp(nearest(mul(acc, inverse)), levels); }

// Rounds up with the probability of the fraction: floor(x + u), u uniform in [0, 1) with 16 bits. Unbiased to 2^-17 of a level.
CODEC float quantize_stochastic(float acc, float inverse, float levels, uint32_t random16) {
  float x = add(mul(acc, inverse), mul((float)(int)random16, 1.0f / 65536.0f));
  float q = nearest(x);
  return clamp(q > x ? sub(q, 1.0f) : q, levels);  // floor by hand: the hardware's floor may flush denormals
}

CODEC float dequantize(float q, float scale) { return mul(q, scale); }

// fp16 with a power-of-two scale per block, which brings the largest magnitude into [2^14, 2^15): no gradient is
// too large or too small for the format, and scaling back is exact.
CODEC BlockScale power_scale(uint32_t absmax) {
  if (absmax >= kNonFinite) return {float_of(kNaN), 0.0f};
  int exponent = (int)(absmax >> 23) - 14;
  if (exponent < 1) exponent = 1;
  return {float_of((uint32_t)exponent << 23), float_of((uint32_t)(254 - exponent) << 23)};
}

}  // namespace
