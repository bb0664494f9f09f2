// The upper bits of an ascending list in unary: the j-th entry, element p, sets bit (p >> bits) + j of a stream.
//
// Pack: one kernel clears the stream, another writes the bytes that are not zero. A thread owns 8 entries, and each byte in
// which one of them is the first: the bits rise with the entries, so whatever else is in that byte are the next 7 at most.
// Its tile is found by the warp, in steps that cut the tiles in 32. Bytes: 2 per entry read, and the stream written twice.
//
// Unpack: a block owns neighbouring bits of the stream, 64 a thread at once. It counts the ones before them by itself, so
// there are not many blocks: these reads, from the cache, are half of the stream for each. Which stretch an entry is in
// passes through shared memory, so that the index is read and written in whole cells. Bytes: 4 per entry, the stream once
// from memory and kMostBlocks / 2 times from the cache.
#include "cells.h"

namespace commopt::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kNever = INT64_MAX;
constexpr int64_t kMostBlocks = 128;
constexpr int kBits = 64 * kThreads;     // of the stream that a block reads at once
constexpr int kCells = kBits / 128;      // that hold them
constexpr int kAhead = 4;                // cells of the index that a thread has read before it writes the first

// --- pack ---

__global__ void __launch_bounds__(kThreads) clear(Cells<uint8_t> cells) {
  int64_t cell = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (cell < cells.count()) cells.store(cell, uint4{0, 0, 0, 0});
}

// The tile of an entry: the last one that begins with it or before it. A warp works together.
__device__ int64_t tile_of(const int64_t* starts, int64_t tiles, int64_t entry) {
  int64_t first = 0, last = tiles - 1;
  while (first < last) {
    int64_t apart = (last - first + 31) / 32, tile = first + (threadIdx.x % 32 + 1) * apart;
    bool reached = tile <= last && starts[tile] <= entry;
    first += __popc(__ballot_sync(kAll, reached)) * apart;
    last = min(last, first + apart - 1);
  }
  return first;
}

// Where ascending entries are in the stream.
struct Places {
  const int64_t* starts;
  int64_t tiles, tile, next;  // next: the entry with which the next tile begins
  int bits;

  __device__ __forceinline__ int64_t start(int64_t t) const { return t < tiles ? starts[t] : kNever; }

  // The next tiles are tried first, those further away in ever larger steps: most often it is the same tile.
  __device__ __forceinline__ void advance(int64_t entry) {
    int64_t step = 1;
    for (; start(tile + step) <= entry; step *= 2) tile += step;
    for (step /= 2; step; step /= 2)
      if (start(tile + step) <= entry) tile += step;
    next = start(tile + 1);
  }
  __device__ __forceinline__ int64_t bit(int64_t entry, uint32_t at) {
    if (next <= entry) advance(entry);
    return (tile << (16 - bits)) + (at >> bits) + entry;
  }
};

__global__ void __launch_bounds__(kThreads) pack(const uint16_t* index, bool aligned, const int64_t* starts, uint8_t* high, int64_t bytes, int64_t k, int64_t tiles, int bits) {
  int64_t first = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kGroup, of_warp = first - threadIdx.x % 32 * kGroup;
  int count = present(k, first);
  uint16_t own[kGroup], after[kGroup];
  load8(index + first, aligned, count, own);
  load8(index + first + kGroup, aligned, present(k, first + kGroup), after);
  Places places{starts, tiles, tile_of(starts, tiles, max(of_warp - 1, (int64_t)0)), 0, bits};
  if (count == 0) return;
  places.next = places.start(places.tile + 1);

  int64_t byte = first ? places.bit(first - 1, index[first - 1]) >> 3 : -1;
  uint32_t value = 0;
  bool mine = false;
  auto write = [&] {
    if (mine && (uint64_t)byte < (uint64_t)bytes) high[byte] = (uint8_t)value;
  };
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i >= count) break;
    int64_t bit = places.bit(first + i, own[i]);
    if (bit >> 3 != byte) {
      write();
      byte = bit >> 3, value = 0, mine = true;
    }
    value |= 1u << (bit & 7);
  }
#pragma unroll
  for (int i = 0; i < kGroup - 1; ++i) {
    if (first + kGroup + i >= k) break;
    int64_t bit = places.bit(first + kGroup + i, after[i]);
    if (bit >> 3 != byte) break;
    value |= 1u << (bit & 7);
  }
  write();
}

// --- unpack ---

// The sum of v over the threads before this one, and in `total` over the block.
__device__ __forceinline__ int64_t sum_before(int64_t v, int64_t& total) {
  __shared__ int64_t of_warp[kWarps];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t sum = v;
  for (int by = 1; by < 32; by *= 2) {
    int64_t other = __shfl_up_sync(kAll, sum, by);
    if (lane >= by) sum += other;
  }
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  int64_t before = sum - v;
  total = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += of_warp[i];
    total += of_warp[i];
  }
  __syncthreads();
  return before;
}

__device__ __forceinline__ int ones_of(uint4 v) { return __popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w); }
__device__ __forceinline__ uint64_t lowest(int bits) { return bits < 64 ? ((uint64_t)1 << bits) - 1 : ~(uint64_t)0; }
__device__ __forceinline__ int from_0_to_64(int64_t v) { return (int)max((int64_t)0, min(v, (int64_t)64)); }

struct Unpack {
  Cells<const uint8_t> high;
  uint16_t* index;
  int64_t* starts;
  int64_t k, tiles, length;
  int64_t steps, of_a_block;  // of kBits
  int bits;

  // The ones in the cells before `cell`, all of which are whole but the first. The block works together.
  __device__ __forceinline__ int64_t ones_before(int64_t cell) const {
    int64_t ones = threadIdx.x == 0 && cell > 0 ? ones_of(high.load(0)) : 0, total;
#pragma unroll 8
    for (int64_t c = 1 + threadIdx.x; c < cell; c += kThreads) ones += ones_of(high.whole_at(c));
    sum_before(ones, total);
    return total;
  }

  // Adds upper(i) above the low bits of entry first + i, for the entries before `end`. The block works together.
  template <class Upper> __device__ __forceinline__ void complete(int64_t first, int64_t end, Upper upper) const {
    if (first >= end) return;
    Cells<uint16_t> cells(index + first, end - first);
    uint32_t low = (1u << bits) - 1;
    for (int64_t begin = threadIdx.x; begin < cells.count(); begin += kAhead * kThreads) {
      uint4 v[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (begin + j * kThreads < cells.count()) v[j] = cells.load(begin + j * kThreads);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        int64_t cell = begin + j * kThreads;
        if (cell >= cells.count()) break;
        uint32_t word[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          uint32_t above = cells.holds(cell, i) ? upper(cell * 8 + i - cells.begin) : 0;
          word[i / 2] = (word[i / 2] & ~(0xffffu << (i % 2 * 16))) | ((word[i / 2] >> (i % 2 * 16) & low) | (above & 0xffffu)) << (i % 2 * 16);
        }
        cells.store(cell, uint4{word[0], word[1], word[2], word[3]});
      }
    }
  }
};

__global__ void __launch_bounds__(kThreads) unpack(Unpack op) {
  __shared__ uint16_t uppers[kBits];
  int64_t step = (int64_t)blockIdx.x * op.of_a_block, last = min(step + op.of_a_block, op.steps);
  int64_t before = op.ones_before(step * kCells);
  int shift = 16 - op.bits;
  if (blockIdx.x == 0 && threadIdx.x == 0) op.starts[0] = 0;
  for (; step < last; ++step) {
    uint4 cell = op.high.load(step * kCells + threadIdx.x / 2);
    uint64_t ones = threadIdx.x % 2 ? (uint64_t)cell.w << 32 | cell.z : (uint64_t)cell.y << 32 | cell.x;
    int64_t at = step * kBits + threadIdx.x * 64 - op.high.begin * 8;  // in the stream, of these bits
    int begin = from_0_to_64(-at), end = from_0_to_64(op.length - at);
    ones &= lowest(end);  // the cells hold zeros before the first
    int own = __popc((uint32_t)ones) + __popc((uint32_t)(ones >> 32));
    int64_t total;
    int mine = (int)sum_before(own, total);
    int64_t entry = before + mine, stretch = at + begin - entry;  // as many zeros as there are before
    int64_t tile = (stretch >> shift) + 1;
    int next = (int)((tile << shift) - stretch);  // zeros until that tile begins
    auto pass = [&](int zeros, int i) {
      for (; zeros >= next; next += 1 << shift, ++tile)
        if (tile < op.tiles) op.starts[tile] = min(entry + i, op.k);
    };
    for (int i = 0; ones; ++i, ones &= ones - 1) {
      int zeros = __ffsll((long long)ones) - 1 - begin - i;
      pass(zeros, i);
      uppers[mine + i] = (uint16_t)(((uint32_t)stretch + zeros) << op.bits);
    }
    if (end > begin) pass(end - begin - own, own);
    __syncthreads();
    op.complete(before, min(before + total, op.k), [&](int64_t i) -> uint32_t { return uppers[i]; });
    before += total;
    __syncthreads();
  }
  if (last < op.steps) return;
  int64_t zeros = op.length - before;
  for (int64_t tile = (zeros >> shift) + 1 + threadIdx.x; tile < op.tiles; tile += kThreads) op.starts[tile] = op.k;
  op.complete(before, op.k, [&](int64_t) -> uint32_t { return (uint32_t)zeros << op.bits; });
}

}  // namespace

void run(const EliasFanoPack& op, cudaStream_t stream) {
  int64_t bytes = ceil_div(op.k + (op.n >> op.bits), 8);
  if (bytes == 0) return;
  Cells<uint8_t> cells(op.high, bytes);
  LAUNCH(clear, ceil_div(cells.count(), kThreads), kThreads, stream, cells);
  if (op.k > 0)
    LAUNCH(pack, group_blocks(op.k), kThreads, stream, op.index, aligned16(op.index), op.starts, op.high, bytes, op.k, ceil_div(op.n, kTile), op.bits);
  check("eliasfano_pack");
}

void run(const EliasFanoUnpack& op, cudaStream_t stream) {
  if (op.n == 0) return;
  int64_t length = op.k + (op.n >> op.bits);
  Cells<const uint8_t> high(op.high, ceil_div(length, 8));
  int64_t steps = length ? ceil_div(high.count(), kCells) : 1, of_a_block = ceil_div(steps, kMostBlocks);
  LAUNCH(unpack, ceil_div(steps, of_a_block), kThreads, stream,
         Unpack{high, op.index, op.starts, op.k, ceil_div(op.n, kTile), length, steps, of_a_block, op.bits});
  check("eliasfano_unpack");
}

}  // namespace commopt::cuda
