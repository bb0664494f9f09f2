// The gradient's dtypes, and how the loops read and write them.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "../codec/bits.h"
#include "../codec/half.h"
#include "../ops.h"

namespace {

struct F32 {
  using Stored = float;
  CODEC static float load(float x) { return x; }
  CODEC static float store(float x) { return x; }
};
struct BF16 {
  using Stored = uint16_t;
  CODEC static float load(uint16_t x) { return from_bf16(x); }
  CODEC static uint16_t store(float x) { return to_bf16(x); }
};
struct F16 {
  using Stored = uint16_t;
  CODEC static float load(uint16_t x) { return from_fp16(x); }
  CODEC static uint16_t store(float x) { return to_fp16(x); }
};

struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };

// body(format) with the format of a dtype; body(Yes) or body(No).
template <class Body> inline void with_dtype(int dtype, Body body) {
  if (dtype == commopt::kFloat32) body(F32());
  else if (dtype == commopt::kBFloat16) body(BF16());
  else body(F16());
}
template <class Body> inline void with_flag(bool flag, Body body) {
  if (flag) body(Yes());
  else body(No());
}

// Loops run in strips of this many values, whose fixed length the compiler unrolls into whole vectors.
constexpr int64_t kStrip = 64;

// A block is shorter than a page, too short for the hardware to prefetch well across its two passes.
constexpr int64_t kAhead = 4096;
template <class T> CODEC void prefetch(const T* p, int64_t count, int64_t ahead = kAhead) {
  for (int64_t byte = 0; byte < count * (int64_t)sizeof(T); byte += 64) __builtin_prefetch((const char*)p + ahead + byte);
}

// The same into the second level of the caches, which waits for more lines at a time and does not push out what is in use.
// Each of two passes over a block fetches half of the lines, the even or the odd ones, so that memory rests in neither.
enum Lines { kEveryLine, kEvenLines, kOddLines };
template <Lines kLines = kEveryLine, class T> CODEC void prefetch_far(const T* p, int64_t count, int64_t ahead = kAhead) {
  constexpr int64_t first = kLines == kOddLines ? 64 : 0, step = kLines == kEveryLine ? 64 : 128;
  for (int64_t byte = first; byte < count * (int64_t)sizeof(T); byte += step) __builtin_prefetch((const char*)p + ahead + byte, 0, 2);
}

// body(first, count) for the strips of [begin, end), where count is a constant but in the last.
template <class Body> CODEC void strips(int64_t begin, int64_t end, Body body) {
  for (; begin + kStrip <= end; begin += kStrip) body(begin, kStrip);
  if (begin < end) body(begin, end - begin);
}

template <class T> CODEC const T* row(const T* p, int64_t stride, int64_t i) { return (const T*)((const char*)p + stride * i); }

CODEC int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
