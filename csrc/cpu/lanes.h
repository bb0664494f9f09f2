// As many 64-bit lanes as the instruction set has, with the operations that Philox needs and a store past the caches.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "../codec/bits.h"

namespace {

// both: exclusive or. last: a final round's two words, side by side in a lane: high half of p ^ a ^ b, then low half of p.
#if defined(__AVX512F__)
constexpr int kLanes = 8;
using Lanes = __m512i;
CODEC Lanes all(uint64_t x) { return _mm512_set1_epi64((long long)x); }
CODEC Lanes load(const uint64_t* p) { return _mm512_loadu_si512(p); }
CODEC void save(void* p, Lanes a) { _mm512_storeu_si512(p, a); }
CODEC void stream(void* p, Lanes a) { _mm512_stream_si512((__m512i*)p, a); }
CODEC Lanes plus(Lanes a, Lanes b) { return _mm512_add_epi64(a, b); }
CODEC Lanes product(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
CODEC Lanes high(Lanes a) { return _mm512_srli_epi64(a, 32); }
CODEC Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
CODEC Lanes both(Lanes a, Lanes b) { return _mm512_xor_si512(a, b); }
CODEC Lanes last(Lanes p, Lanes a, Lanes b) { p = _mm512_rol_epi64(p, 32); return _mm512_mask_ternarylogic_epi32(p, 0x5555, a, b, 0x96); }
CODEC Lanes evens(Lanes a, Lanes b) { return _mm512_unpacklo_epi64(a, b); }
CODEC Lanes odds(Lanes a, Lanes b) { return _mm512_unpackhi_epi64(a, b); }

constexpr int kFloats = 16;  // float32 values in a vector
using Floats = __m512;
// The compiler would widen bytes in two steps, with a shuffle for each half of either.
CODEC Floats widened(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
CODEC Floats times(Floats a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
CODEC Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
CODEC void save(float* p, Floats a) { _mm512_storeu_ps(p, a); }

// Sixteen values times a scale, and those of as many 4-bit codes as a vector holds, the even element in the low nibble, in an
// order that in_order puts right. Codes of 2 bits pick by what a shift leaves of the next one too: their four values stand
// there four times.
struct Sixteen {
  __m512 values;
  CODEC Sixteen(const float* of, float scale) : values(_mm512_mul_ps(_mm512_loadu_ps(of), _mm512_set1_ps(scale))) {}
};
template <int kBits> CODEC Floats looked_up(const Sixteen& table, const uint8_t* codes) {
  if (kBits == 2) {
    const __m512i down = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    int all;
    memcpy(&all, codes, 4);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(all), down), table.values);
  }
  const __m512i down = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  long long all;
  memcpy(&all, codes, 8);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi64(all), down), table.values);
}
template <int kBits> CODEC Floats in_order(Floats a) {
  if (kBits != 4) return a;
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), a);
}
template <bool kFirst> CODEC void look_up(const Sixteen& table, const uint8_t* codes, float* sum) {
  const Floats value = in_order<4>(looked_up<4>(table, codes));
  _mm512_storeu_ps(sum, kFirst ? value : _mm512_add_ps(_mm512_loadu_ps(sum), value));
}
#elif defined(__AVX2__)
constexpr int kLanes = 4;
using Lanes = __m256i;
CODEC Lanes all(uint64_t x) { return _mm256_set1_epi64x((long long)x); }
CODEC Lanes load(const uint64_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
CODEC void save(void* p, Lanes a) { _mm256_storeu_si256((__m256i*)p, a); }
CODEC void stream(void* p, Lanes a) { _mm256_stream_si256((__m256i*)p, a); }
CODEC Lanes plus(Lanes a, Lanes b) { return _mm256_add_epi64(a, b); }
CODEC Lanes product(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
CODEC Lanes high(Lanes a) { return _mm256_srli_epi64(a, 32); }
CODEC Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
CODEC Lanes both(Lanes a, Lanes b) { return _mm256_xor_si256(a, b); }
CODEC Lanes last(Lanes p, Lanes a, Lanes b) { return _mm256_blend_epi32(xor3(high(p), a, b), _mm256_slli_epi64(p, 32), 0xaa); }
CODEC Lanes evens(Lanes a, Lanes b) { return _mm256_unpacklo_epi64(a, b); }
CODEC Lanes odds(Lanes a, Lanes b) { return _mm256_unpackhi_epi64(a, b); }

constexpr int kFloats = 8;
using Floats = __m256;
CODEC Floats widened(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
CODEC Floats times(Floats a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }
CODEC Floats plus(Floats a, Floats b) { return _mm256_add_ps(a, b); }
CODEC void save(float* p, Floats a) { _mm256_storeu_ps(p, a); }

struct Sixteen {
  __m256 low, high;
  CODEC Sixteen(const float* of, float scale)
      : low(_mm256_mul_ps(_mm256_loadu_ps(of), _mm256_set1_ps(scale))), high(_mm256_mul_ps(_mm256_loadu_ps(of + 8), _mm256_set1_ps(scale))) {}
};
template <int kBits> CODEC Floats looked_up(const Sixteen& table, const uint8_t* codes) {
  if (kBits == 2) {
    uint16_t eight;
    memcpy(&eight, codes, 2);
    return _mm256_permutevar8x32_ps(table.low, _mm256_srlv_epi32(_mm256_set1_epi32(eight), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14)));
  }
  const __m256i down = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), up = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
  int eight;
  memcpy(&eight, codes, 4);
  const __m256i all = _mm256_set1_epi32(eight), which = _mm256_srlv_epi32(all, down);
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, which), _mm256_permutevar8x32_ps(table.high, which),
                          _mm256_castsi256_ps(_mm256_sllv_epi32(all, up)));
}
template <int kBits> CODEC Floats in_order(Floats a) { return a; }
template <bool kFirst> CODEC void look_up(const Sixteen& table, const uint8_t* codes, float* sum) {
  for (int i = 0; i < 16; i += 8) {
    const Floats value = looked_up<4>(table, codes + i / 2);
    _mm256_storeu_ps(sum + i, kFirst ? value : _mm256_add_ps(_mm256_loadu_ps(sum + i), value));
  }
}
#else
constexpr int kLanes = 2;
using Lanes = __m128i;
CODEC Lanes all(uint64_t x) { return _mm_set1_epi64x((long long)x); }
CODEC Lanes load(const uint64_t* p) { return _mm_loadu_si128((const __m128i*)p); }
CODEC void save(void* p, Lanes a) { _mm_storeu_si128((__m128i*)p, a); }
CODEC void stream(void* p, Lanes a) { _mm_stream_si128((__m128i*)p, a); }
CODEC Lanes plus(Lanes a, Lanes b) { return _mm_add_epi64(a, b); }
CODEC Lanes product(Lanes a, Lanes b) { return _mm_mul_epu32(a, b); }
CODEC Lanes high(Lanes a) { return _mm_srli_epi64(a, 32); }
CODEC Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm_xor_si128(_mm_xor_si128(a, b), c); }
CODEC Lanes both(Lanes a, Lanes b) { return _mm_xor_si128(a, b); }
CODEC Lanes last(Lanes p, Lanes a, Lanes b) {
  return _mm_or_si128(_mm_and_si128(xor3(high(p), a, b), _mm_set1_epi64x(0xffffffff)), _mm_slli_epi64(p, 32));
}
CODEC Lanes evens(Lanes a, Lanes b) { return _mm_unpacklo_epi64(a, b); }
CODEC Lanes odds(Lanes a, Lanes b) { return _mm_unpackhi_epi64(a, b); }
#endif

}  // namespace
