// What exact top-k and threshold top-k scan with: acc and the new residual of a group of elements, and lists of those
// that are large.
#pragma once
#include "table.h"
#include "values.h"

namespace {

using namespace commopt::cpu;

// --- lists of candidates: acc and the element's offset in its part ---

// Copies the entries whose key lies in [low, high] to `to`, in order, from to[0] on; returns how many. offset + i is the
// second half of an entry where `offsets` is null. Writes whole vectors: `to` needs room for `count` and kSlack more.
#if defined(__AVX512F__)
CODEC int pick(const float* acc, const uint32_t* offsets, uint32_t offset, int count, uint32_t low, uint32_t high, float* to, uint32_t* to_offset) {
  const __m512i from = _mm512_set1_epi32((int)low), width = _mm512_set1_epi32((int)(high - low));
  __m512i lane = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32((int)offset));
  int held = 0;
  for (int i = 0; i < count; i += 16) {
    const __mmask16 here = count - i >= 16 ? 0xffff : (__mmask16)((1u << (count - i)) - 1);
    const __m512i bits = _mm512_maskz_loadu_epi32(here, acc + i), key = _mm512_and_epi32(bits, _mm512_set1_epi32(0x7fffffff));
    const __mmask16 take = _mm512_mask_cmple_epu32_mask(here, _mm512_sub_epi32(key, from), width);
    // Compressed in a register and stored whole: compressing into memory is slow on some machines.
    _mm512_storeu_si512(to + held, _mm512_maskz_compress_epi32(take, bits));
    _mm512_storeu_si512(to_offset + held, _mm512_maskz_compress_epi32(take, offsets ? _mm512_maskz_loadu_epi32(here, offsets + i) : lane));
    lane = _mm512_add_epi32(lane, _mm512_set1_epi32(16));
    held += __builtin_popcount(take);
  }
  return held;
}
#elif defined(__AVX2__)
struct Compress8 {
  uint32_t lanes[256][8];
  constexpr Compress8() : lanes() {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, at = 0; lane < 8; ++lane)
        if (mask >> lane & 1) lanes[mask][at++] = (uint32_t)lane;
  }
};
constexpr Compress8 kCompress8;

CODEC int pick(const float* acc, const uint32_t* offsets, uint32_t offset, int count, uint32_t low, uint32_t high, float* to, uint32_t* to_offset) {
  const __m256i from = _mm256_set1_epi32((int)low), width = _mm256_set1_epi32((int)(high - low));
  int held = 0, i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i bits = _mm256_loadu_si256((const __m256i*)(acc + i));
    const __m256i above = _mm256_sub_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)), from);
    const __m256i take = _mm256_cmpeq_epi32(_mm256_min_epu32(above, width), above);
    const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(take));
    const __m256i lanes = _mm256_loadu_si256((const __m256i*)kCompress8.lanes[mask]);
    const __m256i second = offsets ? _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)(offsets + i)), lanes)
                                   : _mm256_add_epi32(lanes, _mm256_set1_epi32((int)offset + i));
    _mm256_storeu_si256((__m256i*)(to + held), _mm256_permutevar8x32_epi32(bits, lanes));
    _mm256_storeu_si256((__m256i*)(to_offset + held), second);
    held += __builtin_popcount((unsigned)mask);
  }
  for (; i < count; ++i) {
    to[held] = acc[i];
    to_offset[held] = offsets ? offsets[i] : offset + (uint32_t)i;
    held += magnitude(acc[i]) - low <= high - low;
  }
  return held;
}
#else
CODEC int pick(const float* acc, const uint32_t* offsets, uint32_t offset, int count, uint32_t low, uint32_t high, float* to, uint32_t* to_offset) {
  int held = 0;
  for (int i = 0; i < count; ++i) {
    to[held] = acc[i];
    to_offset[held] = offsets ? offsets[i] : offset + (uint32_t)i;
    held += magnitude(acc[i]) - low <= high - low;
  }
  return held;
}
#endif

// --- scan: acc = x + residual * loss_scale; candidates leave 0 behind, the others their acc ---

template <class A, class B> struct Same { char no; };
template <class A> struct Same<A, A> { char yes[2]; };
struct Kept : F32 {};  // in place of the gradient's format: all of acc is in the residual

struct Scan {
  float scale, inverse;  // of the loss
  uint32_t threshold;    // keys from here on are candidates,
  uint32_t lossy;        // and nonzero ones below this; 1 for none
};

// acc[0 .. count) <- those of the elements from `at` on, at most kGroup.
template <class X, bool kResidual, bool kLossy>
CODEC void scan_group(const typename X::Stored* __restrict x, float* __restrict residual, int64_t at, int count, Scan by, float* __restrict acc) {
  constexpr bool kKept = sizeof(Same<X, Kept>) > 1;
  const float sent = mul(0.0f, by.inverse);
  if (!kKept) prefetch_far(x + at, kGroup);
  if (kResidual) prefetch_far(residual + at, kGroup);
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    const float old = kResidual ? residual[at + i] : 0.0f;
    const float a = kKept ? mul(old, by.scale) : kResidual ? accumulate(X::load(x[at + i]), old, by.scale) : X::load(x[at + i]);
    const uint32_t key = magnitude(a), take = (key >= by.threshold) | (kLossy && key - 1 < by.lossy - 1);
    acc[i] = a;
    if (kResidual) residual[at + i] = take ? (key >= kNonFinite ? old : sent) : mul(a, by.inverse);
  }
}

// Which of a group's kGroup values reach the threshold, one bit for each.
CODEC uint64_t reaching(const float* acc, uint32_t threshold) {
  uint64_t found = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < kGroup; i += 16) {
    const __m512i key = _mm512_and_epi32(_mm512_loadu_si512(acc + i), _mm512_set1_epi32(0x7fffffff));
    found |= (uint64_t)_mm512_cmpge_epu32_mask(key, _mm512_set1_epi32((int)threshold)) << i;
  }
#elif defined(__AVX2__)
  for (int i = 0; i < kGroup; i += 8) {
    const __m256i key = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(acc + i)), _mm256_set1_epi32(0x7fffffff));
    const __m256i take = _mm256_cmpgt_epi32(key, _mm256_set1_epi32((int)threshold - 1));  // no key has the highest bit
    found |= (uint64_t)(uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(take)) << i;
  }
#else
  for (int i = 0; i < kGroup; i += 4) {
    const __m128i key = _mm_and_si128(_mm_loadu_si128((const __m128i*)(acc + i)), _mm_set1_epi32(0x7fffffff));
    const __m128i take = _mm_cmpgt_epi32(key, _mm_set1_epi32((int)threshold - 1));
    found |= (uint64_t)(uint32_t)_mm_movemask_ps(_mm_castsi128_ps(take)) << i;
  }
#endif
  return found;
}

// The candidates of a group that are no lossy ones. kOften: many groups hold several. Else most have none or one, and that
// one needs no branch.
template <bool kOften> CODEC int pick_group(const float* acc, int count, uint32_t threshold, uint32_t offset, float* to, uint32_t* to_offset) {
  if (!kOften) {
    const uint64_t taken = reaching(acc, threshold) & ~0ull >> (kGroup - count);
    if ((taken & (taken - 1)) == 0) {
      const int i = __builtin_ctzll(taken | 1ull << (kGroup - 1));
      *to = acc[i], *to_offset = offset + (uint32_t)i;
      return taken != 0;
    }
  }
  return pick(acc, nullptr, offset, count, threshold, 0x7fffffffu, to, to_offset);
}

}  // namespace
