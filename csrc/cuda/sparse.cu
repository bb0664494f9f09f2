// Adding up lists of the largest values, as topk.cu writes them.
//
// Decode: a block owns a unit of 8192 elements of out. It searches each row's list of the tile for the part that is its own, adds
// the rows in their order to sums in shared memory, and writes these out once. Bytes per value: 4 written, and 6 k / n of each
// row read. Adding to the residual: a block owns tiles of 65536 elements; 6 bytes per entry, and the sectors that it touches.
//
// There are no float atomics: the entries of a list that rises are of different elements, and are added at once. Every block
// compares each entry that it adds with the one before it. Where a block's part ends the next one's begins, whatever the list
// holds, and the last one's ends with the list: all entries are seen. A hostile list may not rise: a second kernel, which else ends
// at once, then does all of it again, one entry after the other, so that the sum has the bits of the reference.
#include <algorithm>
#include <atomic>

#include "lists.h"

namespace commopt::cuda {
namespace {

using u64 = unsigned long long;

constexpr int kPart = (int)kBlock;  // of a unit, that is a warp's where entries are added in turn
constexpr int kUnit = kWarps * kPart;
constexpr int kUnitsOfTile = (int)kTile / kUnit;
constexpr int kRows = 32;  // rows of which a block knows the lists at once
constexpr int kAhead = 8;  // rows whose entries are read at once
constexpr int kEach = 4;   // entries of a thread at once, when adding to the residual
constexpr int kChunk = kEach * kThreads;
constexpr int64_t kMostBlocks = 1024;
constexpr int64_t kInTurnBlocks = 128;  // which nearly always have nothing to do
constexpr int kCalls = 4096;  // that can be under way at a time

// The number of a call with a list that does not rise, at that number modulo kCalls.
__device__ u64 suspects[kCalls];

struct Range {  // of entries
  int64_t begin, end;
};

// The entries of a tile. A warp works together. `reached` is the largest start of the tiles before `from` and becomes
// that of the tiles up to `tile`: a start before its predecessor counts as that one, so all before matter.
__device__ Range range_of(const int64_t* starts, int64_t k, int tiles, int from, int tile, int64_t& reached) {
  int64_t most = reached, end = tile + 1 < tiles ? starts[tile + 1] : k;
  for (int first = from; first <= tile; first += 256) {
    int64_t start[8];
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      int t = first + u * 32 + (int)(threadIdx.x % 32);
      start[u] = t <= tile ? starts[t] : 0;
    }
#pragma unroll
    for (int u = 0; u < 8; ++u) most = max(most, min(start[u], k));
  }
  for (int apart = 16; apart; apart /= 2) most = max(most, __shfl_xor_sync(kAll, most, apart));
  reached = most;
  return {most, max(most, min(end, k))};
}

// The entries of a tile if its start and the next are those of a list, else none, and `rises` becomes false.
__device__ __forceinline__ Range list_of(const TopkDecodeSum& op, int64_t row, int64_t tile, int64_t tiles, bool& rises) {
  const int64_t* starts = row_of(op.starts, row, op.place_stride);
  int64_t begin = starts[tile], end = tile + 1 < tiles ? starts[tile + 1] : op.k;
  bool is = 0 <= begin && begin <= end && end <= op.k && end - begin <= kTile;
  rises = rises && is;
  return is ? Range{begin, end} : Range{0, 0};
}

// How many of a list's entries are below `from`, and how many below `to`. A warp works together: each step leaves a 33rd.
__device__ __forceinline__ Range part_of(const uint16_t* index, int count, int from, int to) {
  int lane = threadIdx.x % 32, low[2] = {0, 0}, high[2] = {count, count};
  const int target[2] = {from, to};
  while (max(high[0] - low[0], high[1] - low[1]) > 0) {
    int at[2];
    bool below[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int width = high[i] - low[i];
      at[i] = width > 32 ? low[i] + (int)((int64_t)(lane + 1) * width / 33) : low[i] + lane;
      below[i] = at[i] < high[i] && index[at[i]] < target[i];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int width = high[i] - low[i], passed = __popc(__ballot_sync(kAll, below[i]));
      auto pivot = [&](int p) { return width > 32 ? low[i] + (int)((int64_t)(p + 1) * width / 33) : low[i] + p; };
      int up_to = passed < 32 && pivot(passed) < high[i] ? pivot(passed) : high[i];
      low[i] = passed ? pivot(passed - 1) + 1 : low[i];
      high[i] = width > 32 ? max(up_to, low[i]) : low[i];
    }
  }
  return {low[0], low[1]};
}

template <class T> __global__ void __launch_bounds__(kThreads, 4) decode(T* out, bool out_aligned, TopkDecodeSum op, u64 call) {
  alignas(16) __shared__ float sum[kUnit];
  __shared__ int64_t lists[kRows];  // where they begin
  __shared__ Range parts[kRows];
  int64_t unit = blockIdx.x, tile = unit / kUnitsOfTile, tiles = (op.out.n + kTile - 1) / kTile, begin = unit * kUnit;
  int share = (int)(unit % kUnitsOfTile), base = share * kUnit, size = (int)min((int64_t)kUnit, op.out.n - begin);
  bool last = share == kUnitsOfTile - 1 || unit == gridDim.x - 1, rises = true;
#pragma unroll
  for (int i = 0; i < kUnit / 4 / kThreads; ++i) quads(sum)[i * kThreads + threadIdx.x] = {};
  for (int64_t batch = 0; batch < op.out.rows; batch += kRows) {
    int rows = (int)min((int64_t)kRows, op.out.rows - batch);
    for (int r = threadIdx.x / 32; r < rows; r += kWarps) {
      Range list = list_of(op, batch + r, tile, tiles, rises);
      Range part = part_of(row_of(op.index, batch + r, op.place_stride) + list.begin, (int)(list.end - list.begin), base, base + kUnit);
      if (threadIdx.x % 32 == 0) lists[r] = list.begin, parts[r] = {list.begin + part.begin, last ? list.end : list.begin + part.end};
    }
    __syncthreads();
    for (int first = 0; first < rows; first += kAhead) {
      int at[kAhead], before[kAhead];  // -1: there is none
      float value[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        at[a] = before[a] = -1, value[a] = 0.0f;
        if (first + a >= rows) continue;
        const Range part = parts[first + a];
        const uint16_t* index = row_of(op.index, batch + first + a, op.place_stride);
        int64_t entry = part.begin + threadIdx.x;
        if (entry < part.end) at[a] = index[entry], value[a] = row_of(op.values, batch + first + a, op.out.stride)[entry];
        if (entry < part.end && entry > lists[first + a]) before[a] = index[entry - 1];
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (first + a >= rows) break;
        auto enter = [&](int i, int preceding, float v) {
          rises = rises && preceding < i;
          if ((unsigned)(i - base) < (unsigned)size) sum[i - base] = add(sum[i - base], v);
        };
        if (at[a] >= 0) enter(at[a], before[a], value[a]);
        const Range part = parts[first + a];
        const uint16_t* index = row_of(op.index, batch + first + a, op.place_stride);
        const float* values = row_of(op.values, batch + first + a, op.out.stride);
#pragma unroll 4
        for (int64_t entry = part.begin + kThreads + threadIdx.x; entry < part.end; entry += kThreads) enter(index[entry], index[entry - 1], values[entry]);
        __syncthreads();
      }
    }
  }
  if (!rises) suspects[call % kCalls] = call;
  for (int i = threadIdx.x * kGroup; i < size; i += kThreads * kGroup) {
    T result[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) narrow(result[j], mul(sum[i + j], op.out.weight));
    store8(out + begin + i, out_aligned, min(kGroup, size - i), result, whole_warp(size, i));
  }
}

// Adds those entries of a part that the list of its tile holds, in whatever order, one after the other. A warp works together.
__device__ void add_in_turn(float* sum, int part, int width, const uint16_t* index, const float* values, Range range) {
  int lane = threadIdx.x % 32;
  for (int64_t chunk = range.begin; chunk < range.end; chunk += 32) {
    bool held = chunk + lane < range.end;
    int at = held ? index[chunk + lane] - part * kPart : -1;
    float value = held ? values[chunk + lane] : 0.0f;
    for (unsigned left = __ballot_sync(kAll, at >= 0 && at < width); left; left &= left - 1) {
      int from = __ffs((int)left) - 1, i = __shfl_sync(kAll, at, from);
      float v = __shfl_sync(kAll, value, from);
      if (lane == 0) sum[i] = add(sum[i], v);
    }
  }
}

template <class T> __global__ void __launch_bounds__(kThreads) decode_in_turn(T* out, bool out_aligned, TopkDecodeSum op, u64 call) {
  alignas(16) __shared__ float sums[kWarps][kPart];
  if (suspects[call % kCalls] != call) return;
  float* sum = sums[threadIdx.x / 32];
  int tiles = (int)((op.out.n + kTile - 1) / kTile);
  for (int64_t begin = ((int64_t)blockIdx.x * kWarps + threadIdx.x / 32) * kPart; begin < op.out.n; begin += (int64_t)gridDim.x * kUnit) {
    int tile = (int)(begin / kTile), width = (int)min((int64_t)kPart, op.out.n - begin);
    clear(sum);
    for (int64_t row = 0; row < op.out.rows; ++row) {
      int64_t reached = 0;
      Range range = range_of(row_of(op.starts, row, op.place_stride), op.k, tiles, 0, tile, reached);
      add_in_turn(sum, (int)(begin % kTile) / kPart, width, row_of(op.index, row, op.place_stride), row_of(op.values, row, op.out.stride), range);
    }
    __syncwarp();
    write(out, out_aligned, Lines{begin, kLine, width}, op.out.weight, sum);
    __syncwarp();
  }
}

// Calls add(index within the tile, entry) for the entries in the order of the list, those of different elements at once.
// The block works together; entries of calls before are added first.
template <class Add> __device__ __forceinline__ void visit(const uint16_t* index, Range range, Add add) {
  for (int64_t chunk = range.begin; chunk < range.end; chunk += kChunk) {
    int at[kEach];
    bool disorder = false;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      int64_t entry = chunk + j * kThreads + threadIdx.x;
      at[j] = entry < range.end ? index[entry] : -1;
      if (at[j] >= 0 && entry > chunk) disorder |= index[entry - 1] >= at[j];
    }
    if (!__syncthreads_or(disorder)) {
#pragma unroll
      for (int j = 0; j < kEach; ++j)
        if (at[j] >= 0) add(at[j], chunk + j * kThreads + threadIdx.x);
    } else if (threadIdx.x == 0) {
      for (int64_t entry = chunk; entry < min(chunk + kChunk, range.end); ++entry) add((int)index[entry], entry);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 4) add_to_residual(SparseAdd op) {
  __shared__ Range range;
  __shared__ int64_t reached;
  int64_t tiles = (op.n + kTile - 1) / kTile;
  int first = (int)(tiles * blockIdx.x / gridDim.x), last = (int)(tiles * (blockIdx.x + 1) / gridDim.x);
  float inverse = divide(1.0f, *op.loss_scale);
  for (int tile = first; tile < last; ++tile) {
    __syncthreads();
    if (threadIdx.x < 32) {
      int64_t most = tile == first ? 0 : reached;
      Range r = range_of(op.starts, op.k, (int)tiles, tile == first ? 0 : tile, tile, most);
      __syncwarp();
      if (threadIdx.x == 0) range = r, reached = most;
    }
    __syncthreads();
    visit(op.index, range, [&](int at, int64_t entry) {
      int64_t i = tile * kTile + at;
      if (i < op.n) op.residual[i] = canonical(add(op.residual[i], mul(op.values[entry], inverse)));
    });
  }
}

}  // namespace

void run(const TopkDecodeSum& op, cudaStream_t stream) {
  static std::atomic<u64> calls{0};
  if (op.out.n == 0) return;
  const u64 call = ++calls;
  const int64_t units = ceil_div(op.out.n, kUnit);
  with_type(op.out.dtype, [&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(op.out.out);
    LAUNCH(decode<T>, units, kThreads, stream, out, aligned16(op.out.out), op, call);
    LAUNCH(decode_in_turn<T>, std::min(units, kInTurnBlocks), kThreads, stream, out, aligned16(op.out.out), op, call);
  });
  check("topk_decode_sum");
}

void run(const SparseAdd& op, cudaStream_t stream) {
  if (op.n == 0 || op.k == 0) return;
  LAUNCH(add_to_residual, std::min(ceil_div(op.n, kTile), kMostBlocks), kThreads, stream, op);
  check("sparse_add");
}

}  // namespace commopt::cuda
