// Adding up lists of the largest values, as topk.cu writes them.
//
// Decode: a block owns neighbouring units of 8192 elements of out. It keeps the sum of one in shared memory, adds the
// rows in their order, and writes it out once. Bytes per value: 4 written, and 6 k / n of each row read (the index 8
// times, by the units of its tile, mostly from the cache). Adding to the residual: a block owns tiles of 65536 elements;
// 6 bytes per entry, and the lines of the residual that it touches.
//
// There are no float atomics: the entries of a row that are in ascending order touch different elements and are added at
// once. A hostile row may be in any order, and is then added by one thread, so that the sum has the bits of the reference.
#include "launch.h"

namespace commopt::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kUnit = 8192;
constexpr int kUnitsOfTile = (int)(kTile / kUnit);
constexpr int kEach = 4;                      // entries of a thread at once
constexpr int kChunk = kEach * kThreads;
constexpr int kRows = 64;                     // rows whose ranges are known at once
constexpr int kMostBlocks = 1024;

struct Range {  // of entries
  int64_t begin, end;
};

// The entries of a tile. A warp works together. `reached` is the largest start of the tiles before `from` and becomes
// that of the tiles up to `tile`: a start before its predecessor counts as that one, so all before matter.
__device__ Range range_of(const int64_t* starts, int64_t k, int64_t tiles, int64_t from, int64_t tile, int64_t& reached) {
  int64_t most = reached;
  for (int64_t t = from + threadIdx.x % 32; t <= tile; t += 32) most = max(most, min(starts[t], k));
  for (int apart = 16; apart; apart /= 2) most = max(most, __shfl_xor_sync(kAll, most, apart));
  reached = most;
  return {most, tile + 1 < tiles ? max(most, min(starts[tile + 1], k)) : k};
}

// Calls add(index within the tile, entry) for the entries in the order of the list, those of different elements at once.
// The block works together; entries of calls before are added first.
template <class Add> __device__ __forceinline__ void add_entries(const uint16_t* index, Range range, Add add) {
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

template <class T> __device__ __forceinline__ const T* row_of(const T* first, int64_t row, int64_t stride) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(first) + row * stride);
}

template <class T> __global__ void __launch_bounds__(kThreads) decode(T* out, bool out_aligned, TopkDecodeSum op) {
  __shared__ float sum[kUnit];
  __shared__ Range ranges[kRows];
  __shared__ int64_t reached[kRows];
  int64_t n = op.out.n, rows = op.out.rows, tiles = (n + kTile - 1) / kTile, units = (n + kUnit - 1) / kUnit;
  int64_t unit = units * blockIdx.x / gridDim.x, last = units * (blockIdx.x + 1) / gridDim.x, known = -1;
  for (; unit < last; ++unit) {
    int64_t tile = unit / kUnitsOfTile, begin = unit * kUnit;
    int base = (int)(unit % kUnitsOfTile) * kUnit, size = (int)min((int64_t)kUnit, n - begin);
    for (int i = threadIdx.x; i < kUnit; i += kThreads) sum[i] = 0.0f;
    for (int64_t batch = 0; batch < rows; batch += kRows) {
      int here = (int)min((int64_t)kRows, rows - batch);
      __syncthreads();
      if (tile != known || rows > kRows)
        for (int r = threadIdx.x / 32; r < here; r += kThreads / 32) {
          bool goes_on = known >= 0 && rows <= kRows;  // from the tile before
          int64_t most = goes_on ? reached[r] : 0;
          Range range = range_of(row_of(op.starts, batch + r, op.place_stride), op.k, tiles, goes_on ? tile : 0, tile, most);
          __syncwarp();
          if (threadIdx.x % 32 == 0) ranges[r] = range, reached[r] = most;
        }
      __syncthreads();
      for (int r = 0; r < here; ++r) {
        const float* values = row_of(op.values, batch + r, op.out.stride);
        add_entries(row_of(op.index, batch + r, op.place_stride), ranges[r], [&](int at, int64_t entry) {
          unsigned i = (unsigned)(at - base);
          if (i < (unsigned)size) sum[i] = add(sum[i], values[entry]);
        });
      }
    }
    known = tile;
    __syncthreads();
    for (int i = threadIdx.x * kGroup; i < size; i += kThreads * kGroup) {
      T result[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) narrow(result[j], mul(sum[i + j], op.out.weight));
      store8(out + begin + i, out_aligned, min(kGroup, size - i), result);
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) add_to_residual(SparseAdd op) {
  __shared__ Range range;
  __shared__ int64_t reached;
  int64_t tiles = (op.n + kTile - 1) / kTile, first = tiles * blockIdx.x / gridDim.x, last = tiles * (blockIdx.x + 1) / gridDim.x;
  float inverse = divide(1.0f, *op.loss_scale);
  for (int64_t tile = first; tile < last; ++tile) {
    __syncthreads();
    if (threadIdx.x < 32) {
      int64_t most = tile == first ? 0 : reached;
      Range r = range_of(op.starts, op.k, tiles, tile == first ? 0 : tile, tile, most);
      __syncwarp();
      if (threadIdx.x == 0) range = r, reached = most;
    }
    __syncthreads();
    add_entries(op.index, range, [&](int at, int64_t entry) {
      int64_t i = tile * kTile + at;
      if (i < op.n) op.residual[i] = add(op.residual[i], mul(op.values[entry], inverse));
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
