// Which table of kernels runs, and how an op is split over threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>

#include "../codec/bits.h"
#include "pool.h"
#include "run.h"
#include "selection.h"
#include "table.h"

namespace commopt::cpu {
namespace {

std::vector<const Table*> supported() {
  std::vector<const Table*> tables{&table_base};
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) tables.push_back(&table_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("bmi2"))
    tables.push_back(&table_avx512);
  return tables;
}

const Table* chosen = supported().back();

// A thread is worth waking for this many elements; with fewer it costs more time than it saves.
constexpr int64_t kWorthwhile = 32768;

int useful(int threads, int64_t n) { return (int)std::max<int64_t>(1, std::min<int64_t>(threads, n / kWorthwhile)); }

// Calls run(begin, end) for ranges that together are [0, n), each beginning at a multiple of `unit`.
template <class Run> void split(int64_t n, int64_t unit, int threads, Run run) {
  if (n == 0) return;
  threads = useful(threads, n);
  const int64_t wanted = threads == 1 ? n : std::max(kWorthwhile, n / (threads * 4));
  const int64_t size = (wanted + unit - 1) / unit * unit;
  parallel((n + size - 1) / size, threads, [=](int64_t i) { run(i * size, std::min(n, (i + 1) * size)); });
}

}  // namespace

void run(const DenseEncode& op, int threads) {
  split(op.in.n, 64, threads, [&](int64_t begin, int64_t end) { chosen->dense_encode(op, begin, end); });
}
void run(const DenseDecodeSum& op, int threads) {
  split(op.out.n, 64, threads, [&](int64_t begin, int64_t end) { chosen->dense_decode_sum(op, begin, end); });
}
void run(const HalfEncode& op, int threads) {
  split(op.in.n, op.block, threads, [&](int64_t begin, int64_t end) { chosen->half_encode(op, begin, end); });
}
void run(const HalfDecodeSum& op, int threads) {
  split(op.out.n, op.block, threads, [&](int64_t begin, int64_t end) { chosen->half_decode_sum(op, begin, end); });
}
void run(const AbsMax& op, int threads) {
  std::atomic<uint32_t> most{0};
  split(op.in.n, 64, threads, [&](int64_t begin, int64_t end) {
    const uint32_t found = chosen->absmax(op, begin, end);
    for (uint32_t before = most; before < found && !most.compare_exchange_weak(before, found);) {}
  });
  DefaultFloats floats;
  *op.out = canonical(float_of(most) / op.divisor);
}
void run(const FloatEncode& op, int threads) {
  split(op.in.n, op.block, threads, [&](int64_t begin, int64_t end) { chosen->float_encode(op, begin, end); });
}
void run(const FloatDecodeSum& op, int threads) {
  split(op.out.n, op.block, threads, [&](int64_t begin, int64_t end) { chosen->float_decode_sum(op, begin, end); });
}
void run(const QuantEncode& op, int threads) {
  split(op.in.n, op.block, threads, [&](int64_t begin, int64_t end) { chosen->quant_encode(op, begin, end); });
}
void run(const QuantDecodeSum& op, int threads) {
  split(op.out.n, op.block, threads, [&](int64_t begin, int64_t end) { chosen->quant_decode_sum(op, begin, end); });
}
void run(const QuantResum& op, int threads) {
  struct alignas(64) Line { float values[16]; };
  split(op.to.in.n, op.to.block, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Line[]> totals(new Line[(size_t)op.to.block / 8]);  // of two blocks, which may be too large for the stack
    chosen->quant_resum(op, totals[0].values, begin, end);
  });
}
void run(const QuantAbsMax& op, int threads) {
  split(op.in.n, op.block, threads, [&](int64_t begin, int64_t end) { chosen->quant_absmax(op, begin, end); });
}
void run(const QuantEncodeShared& op, int threads) {
  const int64_t used = (op.in.n * op.width + 7) / 8;
  std::fill(op.codes + used, op.codes + op.nbytes, uint8_t{0});
  split(op.in.n, op.block, threads, [&](int64_t begin, int64_t end) { chosen->quant_encode_shared(op, begin, end); });
}
void run(const QuantDecodeShared& op, int threads) {
  split(op.out.n, op.block, threads, [&](int64_t begin, int64_t end) { chosen->quant_decode_shared(op, begin, end); });
}
void run(const TernaryEncode& op, int threads) {
  split(op.in.n, op.block, threads, [&](int64_t begin, int64_t end) { chosen->ternary_encode(op, begin, end); });
}
void run(const TernaryDecodeSum& op, int threads) {
  split(op.out.n, op.block, threads, [&](int64_t begin, int64_t end) { chosen->ternary_decode_sum(op, begin, end); });
}
void run(const SignEncode& op, int threads) {
  split(op.in.n, op.block, threads, [&](int64_t begin, int64_t end) { chosen->sign_encode(op, begin, end); });
}
void run(const SignDecodeSum& op, int threads) {
  split(op.out.n, op.block, threads, [&](int64_t begin, int64_t end) { chosen->sign_decode_sum(op, begin, end); });
}
void run(const SignVote& op, int threads) {
  split(op.from.out.n, op.from.block, threads, [&](int64_t begin, int64_t end) { chosen->sign_vote(op, begin, end); });
}
void run(const HadamardEncode& op, int threads) {
  split(op.in.n, kStretch, threads, [&](int64_t begin, int64_t end) { chosen->hadamard_encode(op, begin, end); });
}
void run(const HadamardKeep& op, int threads) {
  split(op.in.n, kStretch, threads, [&](int64_t begin, int64_t end) { chosen->hadamard_keep(op, begin, end); });
}
void run(const HadamardDecode& op, int threads) {
  split(op.n, kStretch, threads, [&](int64_t begin, int64_t end) { chosen->hadamard_decode(op, begin, end); });
}
void run(const TopkEncode& op, int threads) {
  topk_encode(*chosen, op, useful(threads, op.in.n));
}
void run(const ThresholdEncode& op, int threads) {
  threshold_encode(*chosen, op, useful(threads, op.in.n));
}
void run(const TopkDecodeSum& op, int threads) {
  split(op.out.n, kTile, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> tile(new float[kTile]);  // too large for the stack of some threads
    chosen->topk_decode_sum(op, tile.get(), begin, end);
  });
}
void run(const SparseAdd& op, int) {
  DefaultFloats floats;
  const float inverse = 1.0f / *op.loss_scale;
  const int64_t tiles = (op.n + kTile - 1) / kTile;
  int64_t from = 0;
  if (tiles > 0) from = std::min(std::max<int64_t>(op.starts[0], 0), op.k);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t to = tile + 1 < tiles ? std::max(from, std::min(op.starts[tile + 1], op.k)) : op.k;
    for (; from < to; ++from) {
      const int64_t at = tile * kTile + op.index[from];
      if (at < op.n) op.residual[at] = op.residual[at] + op.values[from] * inverse;
    }
  }
}
void run(const BlockTopkEncode& op, int threads) {
  split(op.in.n, kBlock, threads, [&](int64_t begin, int64_t end) { chosen->blocktopk_encode(op, begin, end); });
}
void run(const BlockTopkDecodeSum& op, int threads) {
  split(op.out.n, kBlock, threads, [&](int64_t begin, int64_t end) { chosen->blocktopk_decode_sum(op, begin, end); });
}
void run(const BlockTopkAdd& op, int) {
  DefaultFloats floats;
  const float inverse = 1.0f / *op.loss_scale;
  const int64_t blocks = op.n / kBlock;
  for (int64_t block = 0; block <= blocks; ++block) {
    const int64_t from = block * op.k, to = block < blocks ? from + op.k : op.count, width = block < blocks ? kBlock : op.n % kBlock;
    int64_t highest = -1;
    for (int64_t e = from; e < to; ++e) {
      const int64_t i = op.index[e], at = block < blocks ? (i / kLine * blocks + block) * kLine + i % kLine : blocks * kBlock + i;
      if (i > highest && i < width) op.residual[at] = op.residual[at] + op.values[e] * inverse;
      highest = std::max(highest, i);
    }
  }
}
void run(const RandomkEncode& op, int threads) {
  split(op.in.n, 1, threads, [&](int64_t begin, int64_t end) { chosen->randomk_encode(op, begin, end); });
}
void run(const RandomkDecodeSum& op, int threads) {
  split(op.out.n, 1, threads, [&](int64_t begin, int64_t end) { chosen->randomk_decode_sum(op, begin, end); });
}

void axpy(float* r, const float* g, int64_t n, int threads) {
  split(n, 64, threads, [&](int64_t begin, int64_t end) { chosen->axpy(r, g, 1.0f, begin, end); });
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Table* table : supported()) names.push_back(table->name);
  return names;
}

std::string isa() { return chosen->name; }

void use_isa(const std::string& name) {
  std::string known;
  for (const Table* table : supported()) {
    if (name == table->name) {
      chosen = table;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument("isa must be one of " + known + ", got '" + name + "'");
}

}  // namespace commopt::cpu
