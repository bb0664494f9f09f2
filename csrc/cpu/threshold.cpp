// Threshold top-k in one pass. The elements from `begin` on, and those before it, are cut into parts; each scans its own,
// writes the residual, and lists at most k of what reaches the threshold. The first k of all lists, in the order of the
// parts, are the message; what the other lists hold goes back to the residual.
#include <algorithm>
#include <functional>
#include <vector>

#include "../codec/threshold.h"
#include "pool.h"
#include "selection.h"

namespace commopt::cpu {
namespace {

constexpr int64_t kSample = 65536;

// Parts that are scanned side by side, and one more: the elements before `begin` have their own. An offset in one has 32 bits.
int64_t most_parts(int64_t n) { return std::max<int64_t>(8, (n >> 31) + 1); }

// Entries that all lists together have room for. Few large parts need no more than many small ones.
int64_t list_room(int64_t n, int64_t k) { return (most_parts(n) + 1) * (std::min(k, n / most_parts(n) + 1) + kStretch + kSlack); }

// About the k-th largest key: commopt/backends/reference/threshold.py.
uint32_t first_threshold(const ThresholdEncode& op) {
  const int64_t n = op.in.n, m = std::min(n, kSample);
  if (op.k == 0) return kNonFinite;
  std::vector<uint32_t> keys((size_t)m);
  for (int64_t j = 0; j < m; ++j) {
    const int64_t i = sampled(j, n, m);
    const float x = load_x(op.in, i), acc = op.in.residual ? accumulate(x, op.in.residual[i], *op.in.loss_scale) : x;
    keys[j] = magnitude(canonical(acc));
  }
  const int64_t rank = std::max<int64_t>(1, (op.k * m + n / 2) / n);
  std::nth_element(keys.begin(), keys.begin() + (rank - 1), keys.end(), std::greater<uint32_t>());
  return std::min(std::max(1u, keys[rank - 1]), kNonFinite);
}

}  // namespace

int64_t threshold_workspace(int64_t n, int64_t k) { return 8 * list_room(n, k); }

void threshold_encode(const Table& table, const ThresholdEncode& op, int threads) {
  const int64_t n = op.in.n, k = op.k, tiles = (n + kTile - 1) / kTile;
  if (n == 0) return;
  DefaultFloats floats;
  const float inverse = divide(1.0f, *op.in.loss_scale);
  const uint32_t threshold = op.control[0] ? (uint32_t)op.control[0] : first_threshold(op);

  // In the order in which they are chosen from: [begin, n), then [0, begin).
  const int64_t most = threads > 1 ? std::min<int64_t>(most_parts(n), std::max(2 * (int64_t)threads, (n >> 31) + 1)) : (n >> 31) + 1, size = n / most + 1;
  float* const values = (float*)op.workspace;
  uint32_t* const offsets = (uint32_t*)(values + list_room(n, k));
  std::vector<ThresholdPart> parts;
  for (int64_t at = op.begin, place = 0; at < op.begin + n;) {
    const int64_t count = std::min(size, (at < n ? n : op.begin + n) - at), room = std::min(k, count);
    parts.push_back({at % n, at % n + count, room, values + place, offsets + place});
    at += count, place += room + kStretch + kSlack;
  }
  const ThresholdScan scan{op.in, threshold, k > n / 25};
  parallel((int64_t)parts.size(), threads, [&](int64_t p) { table.threshold_scan(scan, parts[p]); });

  std::vector<int64_t> taken, position(parts.size());
  int64_t counts[kThresholdBins] = {}, left = k, sent = 0;
  bool bad = false;
  for (const ThresholdPart& part : parts) {
    taken.push_back(std::min(left, part.held));
    left -= taken.back();
    bad |= part.bad;
    for (int j = 0; j < kThresholdBins; ++j) counts[j] += part.bins[j];
  }
  std::vector<size_t> in_order(parts.size());
  for (size_t p = 0; p < parts.size(); ++p) in_order[p] = p;
  std::sort(in_order.begin(), in_order.end(), [&](size_t a, size_t b) { return parts[a].begin < parts[b].begin; });
  for (size_t p : in_order) position[p] = sent, sent += taken[p];

  parallel((int64_t)parts.size(), threads, [&](int64_t p) {
    const ThresholdPart& part = parts[p];
    const uint32_t *first = part.offset, *end = part.offset + taken[p];
    std::copy(part.acc, part.acc + taken[p], op.values + position[p]);
    for (int64_t i = 0; i < taken[p]; ++i) op.index[position[p] + i] = (uint16_t)(part.begin + part.offset[i]);
    for (int64_t tile = (part.begin + kTile - 1) / kTile; tile * kTile < part.end; ++tile) {
      first = std::lower_bound(first, end, (uint32_t)(tile * kTile - part.begin));
      op.starts[tile] = position[p] + (first - part.offset);
    }
    for (int64_t i = taken[p]; i < part.held && op.in.residual; ++i)
      if (magnitude(part.acc[i]) < kNonFinite) op.in.residual[part.begin + part.offset[i]] = mul(part.acc[i], inverse);
  });
  std::fill(op.values + sent, op.values + k, 0.0f);
  std::fill(op.index + sent, op.index + k, (uint16_t)(n - 1));
  if (bad && k > 0) {
    const int64_t tile = std::upper_bound(op.starts, op.starts + tiles, 0) - op.starts - 1, at = tile * kTile + op.index[0];
    if (op.in.residual && magnitude(op.values[0]) < kNonFinite) op.in.residual[at] = mul(op.values[0], inverse);
    op.values[0] = float_of(kNaN);
  }
  if (bad) op.control[0] = op.control[1] = 0;
  else carry_threshold(op.control, threshold, counts, k);
}

}  // namespace commopt::cpu
