// The k largest of every block of 1024 that is spread over the gradient: commopt/backends/reference/blocktopk.py.
//
// Neighbouring blocks are read side by side, so that memory is read in runs of their lines and not line by line. A block's
// k-th largest key is looked for among the candidates above a guess, which comes from the blocks before and only costs time
// where it is wrong.
#pragma once
#include "half.h"
#include "topk.h"
#include "values.h"

namespace {

using commopt::BlockTopkDecodeSum;
using commopt::BlockTopkEncode;
using commopt::kBlock;
using commopt::kLine;

constexpr int64_t kLines = kBlock / kLine;
constexpr int64_t kAbreast = 8;     // blocks side by side: their acc fills half of a common L2, a run is 1 KB
constexpr uint32_t kMargin = 3u << 19;  // about a sixth of an octave: as far below its mean a k-th key rarely lies
constexpr int64_t kRunsAhead = 4;   // how many runs before its use a run is fetched

// Bit i: whether the key of acc[i] is above `below`, for 64 values.
#if defined(__AVX512F__)
CODEC uint64_t above(const float* acc, int32_t below) {
  const __m512i all = _mm512_set1_epi32(0x7fffffff), limit = _mm512_set1_epi32(below);
  uint64_t mask = 0;
  for (int i = 0; i < 4; ++i)
    mask |= (uint64_t)_mm512_cmpgt_epi32_mask(_mm512_and_epi32(_mm512_loadu_si512(acc + 16 * i), all), limit) << (16 * i);
  return mask;
}
#elif defined(__AVX2__)
CODEC uint64_t above(const float* acc, int32_t below) {
  const __m256i all = _mm256_set1_epi32(0x7fffffff), limit = _mm256_set1_epi32(below);
  uint64_t mask = 0;
  for (int i = 0; i < 8; ++i) {
    const __m256i key = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(acc + 8 * i)), all);
    mask |= (uint64_t)(uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(key, limit))) << (8 * i);
  }
  return mask;
}
#else
CODEC uint64_t above(const float* acc, int32_t below) {
  const __m128i all = _mm_set1_epi32(0x7fffffff), limit = _mm_set1_epi32(below);
  uint64_t mask = 0;
  for (int i = 0; i < 16; ++i) {
    const __m128i key = _mm_and_si128(_mm_loadu_si128((const __m128i*)(acc + 4 * i)), all);
    mask |= (uint64_t)(uint32_t)_mm_movemask_ps(_mm_castsi128_ps(_mm_cmpgt_epi32(key, limit))) << (4 * i);
  }
  return mask;
}
#endif

// Finds the k largest of a block and copies them, in order: acc and their index.
struct Chooser {
  uint32_t near = 0;  // a running mean of the k-th largest keys so far
  alignas(64) float acc[kBlock + 64], found_acc[kBlock + kSlack];
  uint32_t at[kBlock + kSlack], found_at[kBlock + kSlack];

  // How many of the first `count` candidates have a key of at least `low`, which is not 0. Zeros follow the candidates.
  CODEC int reach(int count, uint32_t low) const {
    int reached = 0;
    for (int i = 0; i < count; i += 64) reached += __builtin_popcountll(above(acc + i, (int32_t)low - 1));
    return reached;
  }

  // The chosen are then in found_acc and found_at.
  CODEC void operator()(const float* block, int width, int k) {
    uint32_t low = near > kMargin ? near - kMargin : 0, high = kNaN + 1;
    int count = pick(block, nullptr, 0, width, low, kNaN, acc, at);
    for (uint32_t step = kMargin; count < k; step *= 2) {
      low = low > step ? low - step : 0;
      count = pick(block, nullptr, 0, width, low, kNaN, acc, at);
    }
    memset(acc + count, 0, 64 * sizeof(float));
    int reached = count;  // so many have at least `low`, and fewer than k at least `high`
    for (uint32_t middle = near; reached != k && high - low > 1; middle = low + (high - low) / 2) {
      if (middle <= low || middle >= high) continue;
      const int those = reach(count, middle);
      if (those >= k) low = middle, reached = those;
      else high = middle;
    }
    if (reached == k) {
      pick(acc, at, 0, count, low, kNaN, found_acc, found_at);
    } else {  // all between low and high are equal
      int ties = k - reach(count, high), taken = 0;
      for (int i = 0; i < count && taken < k; ++i) {
        if (magnitude(acc[i]) < low || (magnitude(acc[i]) == low && ties-- <= 0)) continue;
        found_acc[taken] = acc[i];
        found_at[taken++] = at[i];
      }
    }
    near = near == 0 ? low : (uint32_t)((int64_t)near + ((int64_t)low - (int64_t)near) / 4);
  }
};

template <class X, bool kResidual>
CODEC void blocktopk_read(const BlockTopkEncode& op, int64_t first, int64_t count, float scale, float inverse, float* __restrict acc) {
  const typename X::Stored* __restrict x = (const typename X::Stored*)op.in.x + first;
  float* __restrict residual = op.in.residual + (kResidual ? first : 0);
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float old = kResidual ? residual[i] : 0.0f;
    const float a = canonical(kResidual ? accumulate(X::load(x[i]), old, scale) : X::load(x[i]));
    acc[i] = a;
    if (kResidual) residual[i] = magnitude(a) < kNonFinite ? mul(a, inverse) : old;
  }
}

// Sends the k largest of a block, of which element i is the gradient's where(i).
template <class Where>
CODEC void blocktopk_send(const BlockTopkEncode& op, Chooser& choose, const float* acc, int64_t width, int64_t k, int64_t position, float nothing, Where where) {
  if (k == 0) return;
  choose(acc, (int)width, (int)k);
  memcpy(op.values + position, choose.found_acc, (size_t)k * 4);
  for (int64_t e = 0; e < k; ++e) op.index[position + e] = (int16_t)choose.found_at[e];
  if (!op.in.residual) return;
  for (int64_t e = 0; e < k; ++e)
    if (magnitude(choose.found_acc[e]) < kNonFinite) op.in.residual[where(choose.found_at[e])] = nothing;
}

// begin and end: elements, multiples of a block but for the end of the gradient.
template <class X, bool kResidual> void blocktopk_encode_loop(const BlockTopkEncode& op, int64_t begin, int64_t end) {
  const float scale = *op.in.loss_scale, inverse = divide(1.0f, scale), nothing = mul(0.0f, inverse);
  const int64_t blocks = op.in.n / kBlock, last = least(end / kBlock, blocks);
  alignas(64) float acc[kAbreast][kBlock + kLine];  // blocks of 4 KB would all take the same places of a cache
  Chooser choose;
  for (int64_t first = begin / kBlock; first < last; first += kAbreast) {
    const int64_t abreast = least(kAbreast, last - first);
    for (int64_t t = 0; t < kLines; ++t) {
      const int64_t ahead = t + kRunsAhead, run = (t * blocks + first) * kLine;
      const int64_t next = ahead < kLines ? (ahead * blocks + first) * kLine : ((ahead - kLines) * blocks + first + kAbreast) * kLine;
      for (int64_t b = 0; b < abreast; ++b) {
        prefetch_far((const typename X::Stored*)op.in.x + next + b * kLine, kLine, 0);
        if (kResidual) prefetch_far(op.in.residual + next + b * kLine, kLine, 0);
        blocktopk_read<X, kResidual>(op, run + b * kLine, kLine, scale, inverse, acc[b] + t * kLine);
      }
    }
    for (int64_t b = 0; b < abreast; ++b)
      blocktopk_send(op, choose, acc[b], kBlock, op.k, (first + b) * op.k, nothing,
                     [&](int64_t i) { return (i / kLine * blocks + first + b) * kLine + i % kLine; });
  }
  if (end > blocks * kBlock) {
    const int64_t count = end - blocks * kBlock, k = op.count - blocks * op.k;
    blocktopk_read<X, kResidual>(op, blocks * kBlock, count, scale, inverse, acc[0]);
    blocktopk_send(op, choose, acc[0], count, k, blocks * op.k, nothing, [&](int64_t i) { return blocks * kBlock + i; });
  }
}

void blocktopk_encode(const BlockTopkEncode& op, int64_t begin, int64_t end) {
  with_dtype(op.in.dtype, [&](auto x) {
    with_flag(op.in.residual != nullptr, [&](auto residual) { blocktopk_encode_loop<decltype(x), decltype(residual)::value>(op, begin, end); });
  });
}

template <class Out> void blocktopk_decode_loop(const BlockTopkDecodeSum& op, int64_t begin, int64_t end) {
  typename Out::Stored* __restrict out = (typename Out::Stored*)op.out.out;
  const int64_t blocks = op.out.n / kBlock, last = least(end / kBlock, blocks);
  alignas(64) float sum[kAbreast * kBlock];
  // An entry that does not lie beyond those before it is none.
  auto add_block = [&](int64_t w, int64_t from, int64_t k, int64_t count, auto where) __attribute__((always_inline)) {
    const float* values = row(op.values, op.out.stride, w) + from;
    const int16_t* index = row(op.index, op.place_stride, w) + from;
    int highest = -1;
    for (int64_t e = 0; e < k; ++e) {
      const int i = index[e];
      if (i > highest && i < count) {
        float& to = sum[where(i)];
        to = add(to, values[e]);
      }
      highest = i > highest ? i : highest;
    }
  };
  for (int64_t first = begin / kBlock; first < last; first += kAbreast) {
    const int64_t abreast = least(kAbreast, last - first), run = abreast * kLine;
    memset(sum, 0, (size_t)(abreast * kBlock) * 4);
    for (int64_t w = 0; w < op.out.rows; ++w)
      for (int64_t b = 0; b < abreast; ++b)
        add_block(w, (first + b) * op.k, op.k, kBlock, [&](int64_t i) { return i / kLine * run + b * kLine + i % kLine; });
    for (int64_t t = 0; t < kLines; ++t)
      strips(0, run, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
        for (int64_t i = at; i < at + count; ++i) out[(t * blocks + first) * kLine + i] = Out::store(mul(sum[t * run + i], op.out.weight));
      });
  }
  if (end > blocks * kBlock) {
    const int64_t count = end - blocks * kBlock;
    memset(sum, 0, (size_t)count * 4);
    for (int64_t w = 0; w < op.out.rows; ++w) add_block(w, blocks * op.k, op.count - blocks * op.k, count, [](int64_t i) { return i; });
    for (int64_t i = 0; i < count; ++i) out[blocks * kBlock + i] = Out::store(mul(sum[i], op.out.weight));
  }
}

void blocktopk_decode_sum(const BlockTopkDecodeSum& op, int64_t begin, int64_t end) {
  with_dtype(op.out.dtype, [&](auto out) { blocktopk_decode_loop<decltype(out)>(op, begin, end); });
}

}  // namespace
