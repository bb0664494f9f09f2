// Adding up lists of the largest values, as topk.cu writes them.
//
// Decode: a block owns neighbouring units of 8192 elements of out, and of a unit each warp 1024, a part, whose sums it keeps
// in shared memory. Once per tile the block looks through the tile's lists for where the parts begin; a warp then reads its
// part of each list and no more, meets no other, and writes the sums out once. Bytes per value: 4 written, and 6 k / n of
// each row read. The index is read once more by every block that has units of the tile, mostly from the cache.
// Adding to the residual: a block owns tiles of 65536 elements; 6 bytes per entry, and the sectors that it touches.
//
// There are no float atomics: the entries of a row that are in ascending order touch different elements and are added at
// once. A hostile row may be in any order; of its list every warp then reads all, and adds one entry after the other, so
// that the sum has the bits of the reference.
#include "lists.h"

namespace commopt::cuda {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kPart = (int)kBlock;
constexpr int kUnit = kWarps * kPart;
constexpr int kParts = (int)kTile / kPart;  // of a tile
constexpr int kUnitsOfTile = kParts / kWarps;
constexpr int kEach = 4;     // entries of a thread at once, when adding to the residual
constexpr int kChunk = kEach * kThreads;
constexpr int kRows = 32;    // rows of which a block knows the lists at once
constexpr int kAhead = 8;    // lists of a part under way to a warp
constexpr int kPiece = 256;  // of a list, that a warp looks through at once
constexpr int kMostBlocks = 2048;

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

// What a block knows of the lists of one tile.
struct Lists {
  Range range[kRows];
  int64_t reached[kRows];
  bool rise;                          // all of them, from each entry to the next
  uint16_t first[kRows][kParts + 1];  // if they do: the entries before each part, and all, of which the lowest bits suffice
};

// Where the lists of a tile are. A warp owns rows.
__device__ void find_ranges(Lists& lists, const TopkDecodeSum& op, int batch, int rows, int tiles, int tile, bool goes_on) {
  for (int r = threadIdx.x / 32; r < rows; r += kWarps) {
    int64_t most = goes_on ? lists.reached[r] : 0;  // from the tile before
    Range range = range_of(row_of(op.starts, batch + r, op.place_stride), op.k, tiles, goes_on ? tile : 0, tile, most);
    __syncwarp();
    if (threadIdx.x % 32 == 0) lists.range[r] = range, lists.reached[r] = most;
  }
  if (threadIdx.x == 0) lists.rise = true;
}

// Looks through a piece of a list, kPiece entries from `from` on: whether they rise, and where parts begin. What lies beyond
// the last entry is the start of the parts that have none, and of what follows the parts. A warp works together.
__device__ __forceinline__ void look_through(const uint16_t* index, int64_t count, int64_t from, uint16_t* first, bool& rise) {
  int lane = threadIdx.x % 32, at[kPiece / 32], last = from ? index[from - 1] : -1;
#pragma unroll
  for (int u = 0; u < kPiece / 32; ++u) {
    int64_t entry = from + u * 32 + lane;
    at[u] = entry < count ? index[entry] : (int)kTile;
  }
#pragma unroll
  for (int u = 0; u < kPiece / 32; ++u) {
    int64_t entry = from + u * 32 + lane;
    int before = __shfl_up_sync(kAll, at[u], 1);
    if (lane == 0) before = last;
    last = __shfl_sync(kAll, at[u], 31);
    if (entry > count) continue;
    if (before >= at[u]) rise = false;
    #pragma unroll 1
    for (int s = (before + kPart) / kPart; s <= at[u] / kPart; ++s) first[s] = (uint16_t)entry;
  }
}

// The warps take turns at pieces of the lists.
__device__ void find_parts(Lists& lists, const TopkDecodeSum& op, int batch, int rows) {
  unsigned piece = 0;
  for (int r = 0; r < rows; ++r) {
    int64_t count = lists.range[r].end - lists.range[r].begin;
    const uint16_t* index = row_of(op.index, batch + r, op.place_stride) + lists.range[r].begin;
    for (int64_t from = 0; from <= count; from += kPiece)
      if (piece++ % kWarps == threadIdx.x / 32) look_through(index, count, from, lists.first[r], lists.rise);
  }
}

struct Entries {  // of a part, in one row
  const uint16_t* index;
  const float* values;
  int count;
};

__device__ __forceinline__ int count_of(const Lists& lists, int r, int part) { return (lists.first[r][part + 1] - lists.first[r][part]) & 0xffff; }

__device__ __forceinline__ Entries entries_of(const Lists& lists, const TopkDecodeSum& op, int batch, int r, int part) {
  int64_t begin = lists.range[r].begin + lists.first[r][part];
  return {row_of(op.index, batch + r, op.place_stride) + begin, row_of(op.values, batch + r, op.out.stride) + begin, count_of(lists, r, part)};
}

// Adds the entries of a part of lists that rise. A warp works together.
__device__ __forceinline__ void add_part(float* sum, int width, const Lists& lists, const TopkDecodeSum& op, int batch, int rows, int part) {
  int lane = threadIdx.x % 32;
  auto add_one = [&](int at, float value) {
    at -= part * kPart;
    if (at >= 0 && at < width) sum[at] = add(sum[at], value);
  };
  bool all_short = !__ballot_sync(kAll, lane < rows && count_of(lists, min(lane, rows - 1), part) > 32);
  if (all_short)
    add_short_lists<kAhead>(
        rows,
        [&](int r, int& at, float& value) {
          Entries from = entries_of(lists, op, batch, r, part);
          if (lane < from.count) at = from.index[lane], value = from.values[lane];
        },
        add_one);
  else
    add_lists<4>(
        rows, [&](int r) { return entries_of(lists, op, batch, r, part); },
        [&](const Entries&, int at, float value, bool) { add_one(at, value); });
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

template <class T> __global__ void __launch_bounds__(kThreads, 3) decode(T* out, bool out_aligned, TopkDecodeSum op) {
  alignas(16) __shared__ float sums[kWarps][kPart];
  __shared__ Lists lists;
  float* sum = sums[threadIdx.x / 32];
  int rows = (int)op.out.rows, tiles = (int)((op.out.n + kTile - 1) / kTile), known = -1;
  int64_t units = (op.out.n + kUnit - 1) / kUnit;
  int unit = (int)(units * blockIdx.x / gridDim.x), last = (int)(units * (blockIdx.x + 1) / gridDim.x);
  for (; unit < last; ++unit) {
    int tile = unit / kUnitsOfTile, part = unit % kUnitsOfTile * kWarps + (int)threadIdx.x / 32;
    int64_t begin = tile * kTile + part * kPart;
    int width = (int)max((int64_t)0, min((int64_t)kPart, op.out.n - begin));
    clear(sum);
    for (int batch = 0; batch < rows; batch += kRows) {
      int here = min(kRows, rows - batch);
      if (tile != known || rows > kRows) {
        __syncthreads();
        find_ranges(lists, op, batch, here, tiles, tile, known >= 0 && rows <= kRows);
        __syncthreads();
        find_parts(lists, op, batch, here);
        __syncthreads();
        known = tile;
      }
      if (lists.rise)
        add_part(sum, width, lists, op, batch, here, part);
      else
        for (int r = 0; r < here; ++r)
          add_in_turn(sum, part, width, row_of(op.index, batch + r, op.place_stride), row_of(op.values, batch + r, op.out.stride), lists.range[r]);
      __syncwarp();
    }
    write(out, out_aligned, Lines{begin, kLine, width}, op.out.weight, sum);
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

int64_t at_most(int64_t blocks) { return blocks < kMostBlocks ? blocks : kMostBlocks; }

}  // namespace

void run(const TopkDecodeSum& op, cudaStream_t stream) {
  if (op.out.n == 0) return;
  with_type(op.out.dtype, [&](auto type) {
    using T = decltype(type);
    LAUNCH(decode<T>, at_most(ceil_div(op.out.n, kUnit)), kThreads, stream, static_cast<T*>(op.out.out), aligned16(op.out.out), op);
  });
  check("topk_decode_sum");
}

void run(const SparseAdd& op, cudaStream_t stream) {
  if (op.n == 0 || op.k == 0) return;
  LAUNCH(add_to_residual, at_most(ceil_div(op.n, kTile)), kThreads, stream, op);
  check("sparse_add");
}

}  // namespace commopt::cuda
