// The loops of exact top-k; topk.cpp says how they fit together.
#pragma once
#include "candidates.h"
#include "lanes.h"
#include "table.h"

namespace {

using namespace commopt::cpu;
using commopt::kTile;
using commopt::TopkDecodeSum;
using commopt::TopkEncode;

// --- scan: acc = x + residual * loss_scale; candidates go to the list and leave 0 behind, the others their acc ---

inline void count_keys(Segment* segment, int held, uint32_t threshold, TopkPart& part) {
  for (int i = 0; i < held; ++i) segment->acc[i] = canonical(segment->acc[i]);
  int low = 0;
  for (int i = 0; i < held; ++i) {
    uint32_t key = magnitude(segment->acc[i]);
    uint32_t bin = (key - threshold) >> kBinShift;  // huge for the lossy ones, which do not count
    ++part.histogram[bin < (uint32_t)kBins ? bin : (uint32_t)kBins - 1];
    low += key < threshold;
  }
  part.histogram[kBins - 1] -= (uint32_t)low;
  part.found += held - low;
}

// Scans up to `end` and appends to the part's list.
template <class X, bool kResidual, bool kLossy, bool kOften> bool topk_scan_loop(const TopkScan& scan, TopkPart& part, int64_t end) {
  const typename X::Stored* __restrict x = (const typename X::Stored*)scan.op.in.x;
  float* __restrict residual = scan.op.in.residual;
  const float scale = *scan.op.in.loss_scale, inverse = divide(1.0f, scale);
  const uint32_t threshold = scan.threshold, lossy = scan.lossy;
  SegmentStore& store = *scan.store;
  Segment* segment = nullptr;
  int held = kSegment;
  alignas(64) float acc[kGroup] = {};
  bool room = true;
  int64_t at = part.done;
  for (; at < end; at += kGroup) {
    if (held > kSegment - kGroup - kSlack) {
      int drawn = __atomic_fetch_add(&store.used, 1, __ATOMIC_RELAXED);
      if (drawn >= store.capacity) {
        room = false;
        break;
      }
      if (segment) {
        store.count[part.last] = held;
        count_keys(segment, held, threshold, part);
      }
      if (part.first < 0) part.first = drawn;
      else store.next[part.last] = drawn;
      part.last = drawn;
      store.next[drawn] = -1;
      segment = store.segments + drawn;
      held = 0;
    }
    const int count = (int)least(kGroup, end - at);
    scan_group<X, kResidual, kLossy>(x, residual, at, count, {scale, inverse, threshold, lossy}, acc);
    const uint32_t offset = (uint32_t)(at - part.begin);
    if (kLossy) {
      for (int i = 0; i < count; ++i) {
        const uint32_t key = magnitude(acc[i]);
        segment->acc[held] = acc[i];
        segment->offset[held] = offset + (uint32_t)i;
        held += (key >= threshold) | (key - 1 < lossy - 1);
      }
    } else {
      held += pick_group<kOften>(acc, count, threshold, offset, segment->acc + held, segment->offset + held);
    }
  }
  part.done = least(at, end);
  if (segment) {
    store.count[part.last] = held;
    count_keys(segment, held, threshold, part);
  }
  return room;
}

bool topk_scan(const TopkScan& scan, TopkPart& part) {
  bool room = false;
  with_dtype(scan.op.in.dtype, [&](auto x) {
    with_flag(scan.lossy > 1, [&](auto lossy) {
      with_flag(scan.op.k > scan.op.in.n / 25, [&](auto often) {
        using X = decltype(x);
        constexpr bool kLossy = decltype(lossy)::value, kOften = decltype(often)::value;
        const bool residual = scan.op.in.residual != nullptr;
        if (part.done < part.kept && !topk_scan_loop<Kept, true, kLossy, kOften>(scan, part, part.kept)) return;
        room = residual ? topk_scan_loop<X, true, kLossy, kOften>(scan, part, part.end) : topk_scan_loop<X, false, false, kOften>(scan, part, part.end);
        if (residual && part.done > part.kept) part.kept = part.done;
      });
    });
  });
  return room;
}

int64_t topk_keys(const SegmentStore& store, const TopkPart& part, uint32_t low, uint32_t high, uint32_t* keys) {
  float acc[kSegment + kSlack];
  uint32_t offset[kSegment + kSlack];
  int64_t found = 0;
  for (int s = part.first; s >= 0; s = store.next[s]) {
    const int count = pick(store.segments[s].acc, store.segments[s].offset, 0, store.count[s], low, high, acc, offset);
    for (int i = 0; i < count; ++i) keys[found + i] = magnitude(acc[i]);
    found += count;
  }
  return found;
}

// --- emit: the candidates from kth on go to the message, the others back to the residual ---

// One at a time, for a part in which not all that equal kth are sent.
void topk_emit_some(const TopkEmit& emit, const TopkPart& part, int64_t position, int64_t ties) {
  const TopkEncode& op = emit.op;
  const float inverse = divide(1.0f, *op.in.loss_scale);
  int64_t tile = part.begin / kTile;
  for (int s = part.first; s >= 0; s = emit.store->next[s]) {
    const Segment& segment = emit.store->segments[s];
    for (int i = 0; i < emit.store->count[s]; ++i) {
      const float acc = segment.acc[i];
      const uint32_t key = magnitude(acc);
      const int64_t at = part.begin + segment.offset[i];
      if (key > emit.kth || (key == emit.kth && ties-- > 0)) {
        for (; tile * kTile <= at; ++tile) op.starts[tile] = position;
        op.values[position] = acc;
        op.index[position++] = (uint16_t)at;
      } else if (op.in.residual && key < kNonFinite) {
        op.in.residual[at] = mul(acc, inverse);
      }
    }
  }
  for (; tile * kTile < part.end; ++tile) op.starts[tile] = position;
}

// ties: how many of those that equal kth this part may send; -1 for all.
void topk_emit(const TopkEmit& emit, const TopkPart& part, int64_t position, int64_t ties) {
  if (ties >= 0) return topk_emit_some(emit, part, position, ties);
  const TopkEncode& op = emit.op;
  float* const residual = op.in.residual ? op.in.residual + part.begin : nullptr;
  const float inverse = divide(1.0f, *op.in.loss_scale);
  float acc[kSegment + kSlack];
  uint32_t offset[kSegment + kSlack];
  int64_t tile = part.begin / kTile;
  for (int s = part.first; s >= 0; s = emit.store->next[s]) {
    const Segment& segment = emit.store->segments[s];
    const int held = emit.store->count[s];
    int count = emit.kth > kNaN ? 0 : pick(segment.acc, segment.offset, 0, held, emit.kth, 0x7fffffffu, acc, offset);
    memcpy(op.values + position, acc, (size_t)count * 4);
    for (int i = 0; i < count; ++i) op.index[position + i] = (uint16_t)offset[i];
    while (count > 0 && tile * kTile <= part.begin + offset[count - 1]) {
      int before = 0;
      for (int i = 0; i < count; ++i) before += part.begin + offset[i] < tile * kTile;
      op.starts[tile++] = position + before;
    }
    position += count;
    if (residual && emit.kth > 0) {
      count = pick(segment.acc, segment.offset, 0, held, 0, emit.kth - 1, acc, offset);
      for (int i = 0; i < count; ++i)
        if (magnitude(acc[i]) < kNonFinite) residual[offset[i]] = mul(acc[i], inverse);
    }
  }
  for (; tile * kTile < part.end; ++tile) op.starts[tile] = position;
}

// --- decode ---

// An output of so many bytes is written past the caches: what comes first would have left them before the last is there,
// and a line that need not be read before it is written costs half.
constexpr int64_t kStreamed = 8 << 20;
constexpr int64_t kPart = 4096;  // elements at once: their sum stays in the first level of the caches

// out[0 .. count - 1] <- weight * sum.
template <class Out> CODEC void write_sum(const float* __restrict sum, float weight, int64_t count, bool streamed, typename Out::Stored* __restrict out) {
  strips(0, count, [&](int64_t at, int64_t strip) __attribute__((always_inline)) {
    alignas(64) typename Out::Stored values[kStrip];
    for (int64_t i = 0; i < strip; ++i) values[i] = Out::store(mul(sum[at + i], weight));
    if (streamed && strip == kStrip)
      for (size_t i = 0; i < sizeof values; i += sizeof(Lanes)) stream((char*)(out + at) + i, load((const uint64_t*)((const char*)values + i)));
    else memcpy(out + at, values, (size_t)strip * sizeof *out);
  });
}

struct Entries {
  int64_t from, to;
};
CODEC bool in_order(const uint16_t* index, Entries of) {
  int descents = 0;
  for (int64_t j = of.from + 1; j < of.to; ++j) descents += index[j] < index[j - 1];
  return descents == 0;
}

template <class Out> void topk_decode_loop(const TopkDecodeSum& op, float* __restrict sum, int64_t begin, int64_t end) {
  typename Out::Stored* __restrict out = (typename Out::Stored*)op.out.out;
  const bool streamed = op.out.n * (int64_t)sizeof *out >= kStreamed && (uintptr_t)out % sizeof(Lanes) == 0;
  // Where each row's list has arrived: the largest start so far. Rows beyond these look it up again for every tile.
  constexpr int64_t kRemembered = 64;
  int64_t arrived[kRemembered] = {};
  Entries entries[kRemembered];
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t tile = first / kTile, count = least(kTile, end - first);
    auto entries_of = [&](int64_t w) {
      const int64_t* starts = row(op.starts, op.place_stride, w);
      const bool known = w < kRemembered && first > begin;
      int64_t from = known ? arrived[w] : 0;
      for (int64_t t = known ? tile : 0; t <= tile; ++t) from = starts[t] > from ? starts[t] : from;
      if (w < kRemembered) arrived[w] = from;
      const bool last = tile * kTile + kTile >= op.out.n;
      return Entries{least(from, op.k), last ? op.k : least(starts[tile + 1] > from ? starts[tile + 1] : from, op.k)};
    };
    // Part by part if each row's entries are in order, as they are but in a message that no encoder wrote.
    bool ordered = op.out.rows <= kRemembered;
    for (int64_t w = 0; w < least(op.out.rows, kRemembered); ++w) {
      entries[w] = entries_of(w);
      ordered &= in_order(row(op.index, op.place_stride, w), entries[w]);
    }
    const int64_t part = ordered ? kPart : kTile;
    for (int64_t start = 0; start < count; start += part) {
      const int64_t stop = least(start + part, count);
      memset(sum, 0, (size_t)(stop - start) * 4);
      for (int64_t w = 0; w < op.out.rows; ++w) {
        const float* values = row(op.values, op.out.stride, w);
        const uint16_t* index = row(op.index, op.place_stride, w);
        const Entries those = w < kRemembered ? entries[w] : entries_of(w);
        for (int64_t j = those.from; j < those.to; ++j) {
          if (index[j] < stop) sum[index[j] - start] = add(sum[index[j] - start], values[j]);
          else if (ordered) break;
          if (ordered) entries[w].from = j + 1;
        }
      }
      write_sum<Out>(sum, op.out.weight, stop - start, streamed, out + first + start);
    }
  }
  if (streamed) _mm_sfence();  // before other threads are told that it is written
}

void topk_decode_sum(const TopkDecodeSum& op, float* tile, int64_t begin, int64_t end) {
  with_dtype(op.out.dtype, [&](auto out) { topk_decode_loop<decltype(out)>(op, tile, begin, end); });
}

}  // namespace
