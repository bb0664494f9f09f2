// A list of the elements of a gradient that reach a threshold, made in one pass that also writes the residual: for topk.cu
// and threshold.cu.
//
// A block owns a tile of 4096 elements and lists its candidates, in order, in chunks of 32 entries that it takes from a common
// pool: a tile has as many as it needs, however the large values crowd, and later steps have equal pieces of work. Where the
// pool is used up a tile stays as it was ("raw"), and later steps read x and the residual again.
//
// Chunks lie in the pool in the order in which blocks came, which is another in every run. Where an entry goes in a message
// follows from sums over the tiles before its own: of tiles, of groups of 32 tiles, and of groups of 32 groups.
#pragma once
#include "launch.h"

namespace commopt::cuda {
namespace {

using u64 = unsigned long long;

constexpr int kSpan = 4096;  // elements of a tile of the selection; kTile is a multiple
constexpr int kChunk = 32;   // entries
constexpr uint32_t kRaw = 0xffffffffu;
constexpr uint16_t kNone = 0xffff;  // the place of an entry that fills up the last chunk of a tile; its acc is 0

// Cuts a piece of memory into arrays.
struct Cutter {
  uint8_t* at;
  template <class T> void take(T*& field, int64_t count) {
    field = reinterpret_cast<T*>(at);
    at += ceil_div(count * (int64_t)sizeof(T), 256) * 256;
  }
};

// v below 2^51.
__device__ __forceinline__ u64 sum_of_warp(u64 v) {
  return __reduce_add_sync(kAll, (unsigned)(v & 0xffffff)) + ((u64)__reduce_add_sync(kAll, (unsigned)(v >> 24)) << 24);
}

// The sum of v over the threads before this one, and in `total` over the block.
__device__ __forceinline__ u64 sum_before(u64 v, u64& total) {
  __shared__ u64 of_warp[kWarps];
  int warp = threadIdx.x / 32;
  u64 sum = sum_upto(v);
  if (threadIdx.x % 32 == 31) of_warp[warp] = sum;
  __syncthreads();
  u64 before = sum - v;
  total = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += of_warp[i];
    total += of_warp[i];
  }
  __syncthreads();
  return before;
}

// Two numbers for every tile, each of at most 4096, and their sums.
struct Sums {
  u64 *of_tile, *of_group, *of_super;  // [tiles], of 32 tiles, of 1024 tiles: the first in the low half of a word

  void take(Cutter& from, int64_t tiles) {
    from.take(of_tile, tiles), from.take(of_group, ceil_div(tiles, 32)), from.take(of_super, ceil_div(tiles, 1024));
  }
  __device__ static u64 both(u64 first, u64 second) { return first | second << 32; }
  __device__ void clear(int64_t tile) const {
    of_tile[tile] = 0;
    if (tile % 32 == 0) of_group[tile / 32] = 0;
    if (tile % 1024 == 0) of_super[tile / 1024] = 0;
  }
  __device__ void add(int64_t tile, u64 numbers) const {
    if (numbers == 0) return;
    atomicAdd(&of_tile[tile], numbers);
    atomicAdd(&of_group[tile / 32], numbers);
  }
  // The sum of 1024 tiles has so many to add to it that they would wait for each other: a block adds what it has for one of them.
  __device__ void add_to_super(int64_t super, u64 numbers) const {
    if (numbers) atomicAdd(&of_super[super], numbers);
  }
};

struct Pair {
  u64 first, second;
  __device__ void add(u64 numbers) { first += (uint32_t)numbers, second += numbers >> 32; }
};

// The sums of the tiles before this one, which this kernel does not change. A warp works together.
__device__ __forceinline__ Pair before(const Sums& sums, int64_t tile) {
  int64_t lane = threadIdx.x % 32, group = tile / 32, super = tile / 1024;
  Pair p = {0, 0};
  for (int64_t i = lane; i < super; i += 32) p.add(__ldg(&sums.of_super[i]));
  if (super * 32 + lane < group) p.add(__ldg(&sums.of_group[super * 32 + lane]));
  if (group * 32 + lane < tile) p.add(__ldg(&sums.of_tile[group * 32 + lane]));
  return {sum_of_warp(p.first), sum_of_warp(p.second)};
}

// How much of the pool is in use: zero before a call.
struct Pool {
  u64 asked;    // chunks
  u64 refused;  // 0 if there was room for all, else more than as many chunks as the pool has behind the first refusal, by one
};

struct List {
  uint32_t* held;     // [tiles]: entries of a tile, or kRaw
  uint32_t* first;    // [tiles]: its first chunk
  uint32_t* tile_of;  // [chunks]
  float* acc;         // [chunks * kChunk]
  uint16_t* at;       // [chunks * kChunk]: element within the tile
  int64_t tiles, chunks;

  // Room for six times k entries, and one chunk more for every tile.
  void take(Cutter& from, int64_t n, int64_t k) {
    tiles = ceil_div(n, kSpan);
    chunks = tiles + ceil_div(6 * k, kChunk);
    if (chunks > tiles * (kSpan / kChunk)) chunks = tiles * (kSpan / kChunk);
    from.take(held, tiles), from.take(first, tiles), from.take(tile_of, chunks);
    from.take(acc, chunks * kChunk), from.take(at, chunks * kChunk);
  }
  __device__ int64_t used(const Pool& pool) const { return pool.refused ? chunks + 1 - (int64_t)pool.refused : (int64_t)pool.asked; }

  // Chunks for `found` entries of a tile, for one thread: the number of the first, or kRaw.
  __device__ uint32_t reserve(Pool* pool, int64_t tile, uint32_t found) const {
    u64 wanted = (found + kChunk - 1) / kChunk, place = wanted ? atomicAdd(&pool->asked, wanted) : 0;
    bool fits = place + wanted <= (u64)chunks;
    if (!fits) atomicMax(&pool->refused, 1 + (place < (u64)chunks ? (u64)chunks - place : (u64)0));
    held[tile] = fits ? found : kRaw;
    first[tile] = (uint32_t)place;
    return fits ? (uint32_t)place : kRaw;
  }
};

struct Mark {
  bool candidate, counted;
};

// Lists the candidates of this block's tile, clears their residual and writes that of all others. mark(acc, element) says which
// are candidates, and which of these are counted; one thread calls counted(candidates, those counted).
template <class T, class Marks, class Counted>
__device__ __forceinline__ void list_tile(const Gradient<T>& in, const List& list, Pool* pool, float scale, Marks mark, Counted counted) {
  __shared__ uint32_t reserved;
  float acc[2][kGroup], old[kGroup], inverse = divide(1.0f, scale);  // a thread has groups t and 256 + t
  uint32_t candidates[2];  // a bit for each
  u64 counts = 0;          // 16 bits each: of the first groups, of the second groups, those counted
  int64_t first[2];
  int count[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    first[j] = (int64_t)blockIdx.x * kSpan + (j * kThreads + threadIdx.x) * kGroup;
    count[j] = present(in.n, first[j]);
    in.load(count[j] ? first[j] : 0, count[j], scale, acc[j], old);
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    candidates[j] = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      Mark m = mark(acc[j][i], first[j] + i);
      candidates[j] |= (uint32_t)(m.candidate && i < count[j]) << i;
      counts += (u64)(m.counted && i < count[j]) << 32;
    }
    counts += (u64)__popc(candidates[j]) << (16 * j);
  }
  u64 total, before = sum_before(counts, total);
  uint32_t of_first = (uint32_t)(total & 0xffff), found = of_first + (uint32_t)(total >> 16 & 0xffff);
  if (threadIdx.x == 0) {
    reserved = list.reserve(pool, blockIdx.x, found);
    counted(found, (uint32_t)(total >> 32));
  }
  __syncthreads();
  uint32_t chunk = reserved, chunks = (found + kChunk - 1) / kChunk;
  if (chunk == kRaw) return;
  int64_t begin = (int64_t)chunk * kChunk;
  if (threadIdx.x < chunks) list.tile_of[chunk + threadIdx.x] = blockIdx.x;
  if (threadIdx.x < chunks * kChunk - found) {
    list.acc[begin + found + threadIdx.x] = 0.0f;
    list.at[begin + found + threadIdx.x] = kNone;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    int64_t to = begin + (j ? of_first + (before >> 16 & 0xffff) : before & 0xffff);
    float kept[kGroup];
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      bool chosen = candidates[j] >> i & 1;
      if (chosen) {
        list.acc[to] = acc[j][i];
        list.at[to] = (uint16_t)((j * kThreads + threadIdx.x) * kGroup + i);
        ++to;
      }
      kept[i] = mul(chosen ? 0.0f : acc[j][i], inverse);
      finite = finite && magnitude(acc[j][i]) < kNonFinite;
    }
    if (!in.residual) continue;
    bool together = whole_warp(in.n, first[j]);
    if (together) together = __all_sync(kAll, finite);
    if (finite) {
      store8(in.residual + first[j], in.residual_aligned, count[j], kept, together);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if (i < count[j] && magnitude(acc[j][i]) < kNonFinite) in.residual[first[j] + i] = kept[i];
    }
  }
}

// The chunks of a block: neighbours, most of which are of neighbouring tiles.
struct Chunks {
  int64_t begin, end;
  __device__ __forceinline__ Chunks(const List& list, const Pool& pool, bool useless) {
    int64_t used = useless ? 0 : list.used(pool), each = (used + gridDim.x - 1) / gridDim.x;
    begin = min(blockIdx.x * each, used), end = min(begin + each, used);
  }
};

// Calls chunk(number) for the chunks of the list, and tile(number) for the raw tiles, or for all tiles and no chunk where the
// list is of no use: each by one warp of the grid.
template <class OfChunk, class OfTile> __device__ __forceinline__ void each_piece(const List& list, const Pool& pool, bool useless, OfChunk chunk, OfTile tile) {
  int64_t warp = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32, warps = (int64_t)gridDim.x * kWarps;
  Chunks own(list, pool, useless);
#pragma unroll 2
  for (int64_t c = own.begin + threadIdx.x / 32; c < own.end; c += kWarps) chunk(c);
  if (!useless && !pool.refused) return;
  for (int64_t t = warp; t < list.tiles; t += warps)
    if (useless || list.held[t] == kRaw) tile(t);
}

}  // namespace
}  // namespace commopt::cuda
