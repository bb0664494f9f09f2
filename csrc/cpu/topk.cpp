// Exact top-k in one pass. A guess below the k-th largest magnitude sends everything above it to a list of candidates in
// the same pass that writes the residual, and the choice is made from the list. The guess is a margin below the k-th
// largest of the last step while that moves little, and comes from a sample of the elements while it moves much. Where it
// was wrong (fewer than k candidates, or more than the list holds) the pass is repeated with a guess from a larger, more
// careful sample, and where that fails too, or the candidates cannot be put back, a slow radix selection gives the same
// answer. Both work from what the pass left: scanned elements that are no candidates have residual * loss_scale == acc
// exactly (those for which that fails were made candidates), the rest is untouched.
#include <math.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <vector>

#include "../codec/bits.h"
#include "pool.h"
#include "selection.h"

namespace commopt::cpu {
namespace {

constexpr int64_t kMaxParts = 64;

int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

// Room for 2 k candidates and some more, and for every part's last segment to be nearly empty.
int64_t segment_count(int64_t n, int64_t k) { return (2 * k + n / 256) / (kSegment - kGroup - kSlack) + std::min(tiles_of(n), kMaxParts) + 8; }

// What is carried from call to call; all zero before the first.
struct Carried {
  uint32_t kth;  // key of the k-th largest, 0: not known
  float margin;  // relative distance to keep below it
  uint8_t padding[56];
};

// Up to here the margin costs less in candidates than a sample does in time. kWidest: a few steps from there.
constexpr float kSteady = 0.03f, kWidest = 0.06f;

constexpr uint32_t kNone = 0xffffffffu;  // above every key

uint32_t key_of(float acc) { return magnitude(acc) > kNonFinite ? kNaN : magnitude(acc); }

// acc of an element that is not in the list: scanned ones have it in the residual.
float acc_at(const Input& in, const TopkPart& part, float scale, int64_t i) {
  if (!in.residual) return load_x(in, i);
  return i < part.kept ? mul(in.residual[i], scale) : accumulate(load_x(in, i), in.residual[i], scale);
}

// Walks through acc in order, wherever the pass left it.
struct Reader {
  const Input& in;
  const SegmentStore& store;
  const TopkPart& part;
  float scale = *in.loss_scale;
  int segment = part.first, entry = 0;

  float operator()(int64_t i) {
    while (segment >= 0 && entry == store.count[segment]) segment = store.next[segment], entry = 0;
    if (segment >= 0 && part.begin + store.segments[segment].offset[entry] == i) return store.segments[segment].acc[entry++];
    return acc_at(in, part, scale, i);
  }
};

struct Choice {
  uint32_t kth;
  std::vector<int64_t> position, ties, equal;  // of each part: where its entries begin, how many equal to kth it may send, and has
};

// The first `ties` elements equal to kth are sent, in the order of the parts.
void share(Choice& choice, int64_t k, const std::vector<int64_t>& above, const std::vector<int64_t>& equal) {
  int64_t ties = k, position = 0;
  for (int64_t a : above) ties -= a;
  for (size_t p = 0; p < above.size(); ++p) {
    choice.position.push_back(position);
    choice.ties.push_back(std::min(ties, equal[p]));
    position += above[p] + choice.ties[p];
    ties -= choice.ties[p];
  }
  choice.equal = equal;
}

// --- the slow way: two radix passes, then one that writes ---

template <class Body> void each(const TopkEncode& op, const SegmentStore& store, const TopkPart& part, Body body) {
  Reader acc{op.in, store, part};
  for (int64_t i = part.begin; i < part.end; ++i) body(i, acc(i));
}

Choice choose_slowly(const TopkEncode& op, int threads, const SegmentStore& store, const std::vector<TopkPart>& parts) {
  const int64_t count = (int64_t)parts.size();
  constexpr int64_t kHigh = 1 << 16, kLow = 1 << 15;
  Choice choice;
  std::vector<int64_t> above(count), equal(count);
  std::vector<uint32_t> bins(count * kHigh);
  // Finds the bin in which the k-th largest lies, and counts per part what lies above it.
  auto pick = [&](int64_t width, int64_t k) {
    int64_t bin = width - 1, total = 0;
    for (;; --bin) {
      int64_t here = 0;
      for (int64_t p = 0; p < count; ++p) here += bins[p * kHigh + bin];
      if (total + here >= k || bin == 0) break;
      total += here;
    }
    for (int64_t p = 0; p < count; ++p)
      for (int64_t b = bin + 1; b < width; ++b) above[p] += bins[p * kHigh + b];
    for (int64_t p = 0; p < count; ++p) equal[p] = bins[p * kHigh + bin];
    return bin;
  };
  if (op.k == 0) {
    choice.kth = kNone;
  } else {
    parallel(count, threads, [&](int64_t p) { each(op, store, parts[p], [&](int64_t, float acc) { ++bins[p * kHigh + (key_of(acc) >> 15)]; }); });
    const uint32_t high = (uint32_t)pick(kHigh, op.k);
    int64_t left = op.k;
    for (int64_t a : above) left -= a;
    std::fill(bins.begin(), bins.end(), 0);
    parallel(count, threads, [&](int64_t p) {
      each(op, store, parts[p], [&](int64_t, float acc) {
        if (key_of(acc) >> 15 == high) ++bins[p * kHigh + (key_of(acc) & (kLow - 1))];
      });
    });
    choice.kth = high << 15 | (uint32_t)pick(kLow, left);
  }
  share(choice, op.k, above, equal);
  return choice;
}

void write_slowly(const TopkEncode& op, int threads, const SegmentStore& store, const std::vector<TopkPart>& parts, const Choice& choice) {
  parallel((int64_t)parts.size(), threads, [&](int64_t p) {
    const float inverse = divide(1.0f, *op.in.loss_scale);
    int64_t position = choice.position[p], ties = choice.ties[p];
    each(op, store, parts[p], [&](int64_t i, float acc) {
      if (i % kTile == 0) op.starts[i / kTile] = position;
      const uint32_t key = key_of(acc);
      const bool sent = key > choice.kth || (key == choice.kth && ties-- > 0);
      if (op.in.residual && key < kNonFinite) op.in.residual[i] = mul(sent ? 0.0f : acc, inverse);
      if (sent) {
        op.values[position] = canonical(acc);
        op.index[position++] = (uint16_t)i;
      }
    });
  });
}

// --- the fast way ---

// A key that more than k elements reach, most likely, from a sample of about n * share elements in whole cache lines. 0: all.
// `safety`: how many of its standard deviations the sample may be wrong.
uint32_t sampled_threshold(const TopkEncode& op, const std::vector<TopkPart>& parts, double share, double safety) {
  constexpr int64_t kLine = 16, kFetched = 32;  // elements in a line; lines on their way from memory
  const int64_t n = op.in.n, lines = n / kLine, taken = std::min(lines, std::max<int64_t>(1024, (int64_t)((double)lines * share)));
  if (2 * op.k >= n || taken == 0) return 0;
  std::vector<int64_t> begin(taken);
  uint64_t state = 0x9E3779B97F4A7C15u;
  for (int64_t j = 0; j < taken; ++j) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const int64_t low = lines * j / taken, high = lines * (j + 1) / taken;
    begin[j] = (low + (int64_t)((state >> 33) % (uint64_t)(high - low))) * kLine;
  }
  const float scale = *op.in.loss_scale;
  const int64_t bytes = op.in.dtype == kFloat32 ? 4 : 2;
  std::vector<uint32_t> keys(taken * kLine);
  size_t p = 0;
  for (int64_t j = 0; j < taken; ++j) {
    if (j + kFetched < taken) {
      __builtin_prefetch((const char*)op.in.x + begin[j + kFetched] * bytes);
      if (op.in.residual) __builtin_prefetch(op.in.residual + begin[j + kFetched]);
    }
    while (parts[p].end <= begin[j]) ++p;
    for (int64_t i = 0; i < kLine; ++i) keys[j * kLine + i] = key_of(acc_at(op.in, parts[p], scale, begin[j] + i));
  }
  const double expected = (double)op.k * (double)keys.size() / (double)n;
  const int64_t rank = taken == lines ? op.k - 1 : (int64_t)(expected * 1.02 + safety * (sqrt(expected) + 1.0));
  if (rank >= (int64_t)keys.size()) return 0;
  std::nth_element(keys.begin(), keys.begin() + rank, keys.end(), std::greater<uint32_t>());
  return keys[rank];
}

// The list gives acc back for elements whose residual cannot. Sets what scan needs for that; false where none would do:
// the product with 1 / loss_scale is undone exactly by that with loss_scale only for powers of two, short of the ends of the range.
bool invertible(const TopkEncode& op, uint32_t& threshold, uint32_t& lossy) {
  lossy = 1;
  threshold = std::min(threshold, kNonFinite);
  if (!op.in.residual) return true;
  const uint32_t bits = magnitude(*op.in.loss_scale);
  const int exponent = (int)(bits >> 23) - 127;
  if ((bits & 0x7fffff) != 0 || exponent < -120 || exponent > 120) return false;
  if (exponent > 0) lossy = (uint32_t)(exponent + 1) << 23;
  if (exponent < 0) threshold = std::min(threshold, (uint32_t)(255 + exponent) << 23);
  return true;
}

// Finds the k-th largest among the candidates, of which there are at least k.
Choice choose(const Table& table, const TopkEncode& op, int threads, uint32_t threshold, const SegmentStore& store, const std::vector<TopkPart>& parts) {
  const int64_t count = (int64_t)parts.size();
  Choice choice;
  std::vector<int64_t> above(count), equal(count);
  if (op.k == 0) {
    choice.kth = kNone;
  } else {
    int64_t bin = kBins, left = op.k;
    for (int64_t here = 0; left > here;) {
      left -= here, here = 0, --bin;
      for (const TopkPart& part : parts) here += part.histogram[bin];
    }
    // Only the keys in the bin of the k-th largest have to be looked at.
    std::vector<int64_t> begin(count + 1);
    for (int64_t p = 0; p < count; ++p) begin[p + 1] = begin[p] + parts[p].histogram[bin];
    std::vector<uint32_t> keys(begin[count]);
    const uint32_t low = threshold + ((uint32_t)bin << kBinShift), high = bin == kBins - 1 ? kNaN : low + (1u << kBinShift) - 1;
    parallel(count, threads, [&](int64_t p) {
      for (int64_t b = bin + 1; b < kBins; ++b) above[p] += parts[p].histogram[b];
      table.topk_keys(store, parts[p], low, high, keys.data() + begin[p]);
    });
    std::vector<uint32_t> sorted = keys;
    std::nth_element(sorted.begin(), sorted.begin() + (left - 1), sorted.end(), std::greater<uint32_t>());
    choice.kth = sorted[left - 1];
    for (int64_t p = 0; p < count; ++p)
      for (int64_t i = begin[p]; i < begin[p + 1]; ++i) above[p] += keys[i] > choice.kth, equal[p] += keys[i] == choice.kth;
  }
  share(choice, op.k, above, equal);
  return choice;
}

enum Outcome { kFine, kTooFew, kTooMany, kSlow };

Outcome scan(const Table& table, const TopkEncode& op, int threads, uint32_t threshold, uint32_t lossy, SegmentStore& store,
             std::vector<TopkPart>& parts) {
  const TopkScan scan{op, threshold, lossy, &store};
  std::atomic<bool> room{true};
  parallel((int64_t)parts.size(), threads, [&](int64_t p) {
    if (!table.topk_scan(scan, parts[p])) room = false;
  });
  int64_t found = 0;
  for (const TopkPart& part : parts) found += part.found;
  return !room ? kTooMany : found < op.k ? kTooFew : kFine;
}

// Gives the candidates back to the residual and empties the list, for another scan. False, with nothing done, where one
// of them could not be read from the residual again.
bool put_back(const TopkEncode& op, int threads, uint32_t lossy, SegmentStore& store, std::vector<TopkPart>& parts) {
  const float scale = *op.in.loss_scale, inverse = divide(1.0f, scale);
  auto each_candidate = [&](auto body) {
    parallel((int64_t)parts.size(), threads, [&](int64_t p) {
      for (int s = parts[p].first; s >= 0; s = store.next[s])
        for (int i = 0; i < store.count[s]; ++i) body(parts[p].begin + store.segments[s].offset[i], store.segments[s].acc[i]);
    });
  };
  if (op.in.residual) {
    std::atomic<bool> exact{true};
    each_candidate([&](int64_t, float acc) {
      if (bits_of(mul(mul(acc, inverse), scale)) != bits_of(acc) || magnitude(acc) >= kNonFinite || magnitude(acc) - 1 < lossy - 1) exact = false;
    });
    if (!exact) return false;
    each_candidate([&](int64_t at, float acc) { op.in.residual[at] = mul(acc, inverse); });
  }
  for (TopkPart& part : parts) {
    std::fill(part.histogram, part.histogram + kBins, 0);
    part.done = part.begin, part.first = part.last = -1, part.found = 0;
  }
  store.used = 0;
  return true;
}

bool steady(const Carried& carried) {
  return carried.kth > 0 && carried.kth < kNonFinite && carried.margin > 0.0f && carried.margin <= kSteady;
}

// The next margin: as far below the k-th largest as it has fallen lately, for as long as that pays. Where it rises, as it
// does for the first steps of error feedback, the last one says little, and a margin beyond kSteady has the next ones sampled.
void carry(Carried& carried, uint32_t kth, Outcome outcome) {
  const bool usable = kth > 0 && kth < kNonFinite, known = carried.kth > 0 && carried.kth < kNonFinite && carried.margin > 0.0f;
  const float ratio = usable && known ? float_of(kth) / float_of(carried.kth) : 2.0f;
  const float margin = known ? std::min(carried.margin, kWidest) : kWidest;
  float next = std::max(0.85f * margin, 1.6f * (1.0f - ratio));
  if (ratio > 1.0f + kSteady || outcome != kFine) next = kWidest;
  carried.margin = std::min(kWidest, std::max(0.004f, next));
  carried.kth = usable ? kth : 0;
}

}  // namespace

int64_t topk_workspace(int64_t n, int64_t k) {
  return (int64_t)sizeof(Carried) + segment_count(n, k) * (int64_t)(sizeof(Segment) + 2 * sizeof(int));
}

void topk_encode(const Table& table, const TopkEncode& op, int threads) {
  const int64_t n = op.in.n, tiles = tiles_of(n), segments = segment_count(n, op.k);
  if (n == 0) return;
  DefaultFloats floats;
  Carried& carried = *(Carried*)op.workspace;
  Segment* const first = (Segment*)(op.workspace + sizeof(Carried));
  int* const chain = (int*)(first + segments);
  SegmentStore store{first, chain, chain + segments, (int)segments, 0};

  int64_t count = threads > 1 ? std::min<int64_t>({tiles, 2 * (int64_t)threads, kMaxParts}) : 1;
  count = std::max(count, (n >> 31) + 1);  // an offset within a part has 32 bits
  std::vector<uint32_t> histograms((size_t)(count * kBins));
  std::vector<TopkPart> parts;
  for (int64_t p = 0; p < count; ++p) {
    const int64_t begin = tiles * p / count * kTile, end = std::min(n, tiles * (p + 1) / count * kTile);
    parts.push_back({begin, end, begin, begin, -1, -1, 0, histograms.data() + p * kBins});
  }

  uint32_t threshold, lossy;
  if (op.k == 0) threshold = kNonFinite;
  else if (steady(carried)) threshold = bits_of(float_of(carried.kth) * (1.0f - carried.margin));
  else threshold = sampled_threshold(op, parts, 1.0 / 512, 5.0);
  const bool quick = invertible(op, threshold, lossy);
  Outcome first_try = kFine, last_try = kSlow;
  if (quick) {
    first_try = last_try = scan(table, op, threads, threshold, lossy, store, parts);
    if (last_try != kFine && op.k > 0 && put_back(op, threads, lossy, store, parts)) {
      threshold = sampled_threshold(op, parts, 1.0 / 64, 10.0);
      invertible(op, threshold, lossy);
      last_try = scan(table, op, threads, threshold, lossy, store, parts);
    }
  }
  const bool listed = last_try == kFine;
  const Choice choice = listed ? choose(table, op, threads, threshold, store, parts) : choose_slowly(op, threads, store, parts);
  if (listed) {
    const TopkEmit emit{op, &store, choice.kth};
    parallel(count, threads, [&](int64_t p) {
      const bool all = choice.ties[p] == choice.equal[p];
      table.topk_emit(emit, parts[p], choice.position[p], all ? -1 : choice.ties[p]);
    });
  } else {
    write_slowly(op, threads, store, parts, choice);
  }
  if (op.k > 0) carry(carried, choice.kth, first_try);
}

}  // namespace commopt::cpu
