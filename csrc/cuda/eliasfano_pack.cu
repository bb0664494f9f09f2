// The upper bits of an ascending list in unary, written: the j-th entry, element p, sets bit (p >> bits) + j of a stream.
//
// A block owns a tile, whose entries and so whose bits of the stream begin where `starts` says, and the bytes in which one of these
// bits is the first. It makes them in shared memory and writes whole cells, zeros and ones alike. Most tiles take one load of
// `starts` and one of the index, one after the other. Bytes: 2 per entry read, and the stream written once.
#include "cells.h"

namespace commopt::cuda {
namespace {

constexpr int kPackThreads = 128;
constexpr int kPackBlocks = 8;  // of a multiprocessor, so that those of 1024 tiles run at the same time
constexpr int kPackAhead = 3;    // cells of the index that a thread has read before it uses the first
constexpr int kWindow = 4096;   // bytes that are made at once: enough for most tiles
constexpr int kByte = 8;

struct Pack {
  Cells<const uint16_t> index;
  const int64_t* starts;
  uint8_t* high;
  int64_t k, tiles, length;
  int bits;

  __device__ __forceinline__ int64_t start(int64_t tile) const { return tile < tiles ? max((int64_t)0, min(starts[tile], k)) : k; }
  // Of a tile's first bit.
  __device__ __forceinline__ int64_t byte_after(int64_t tile, int64_t start) const {
    int64_t bit = tile == 0 ? 0 : tile < tiles ? start + (tile << (16 - bits)) : length;
    return (bit + kByte - 1) / kByte;
  }
};

// The bits that a block makes, in shared memory. They lie there as they do in the cells.
struct Window {
  uint32_t* words;
  uint32_t begin, bits;

  // Of 64 bits from `at` on, those that are here.
  __device__ __forceinline__ uint64_t here(int at) const {
    int below = (int)begin - at, until = (int)(begin + bits) - at;
    uint64_t not_behind = until >= 64 ? ~(uint64_t)0 : until > 0 ? ((uint64_t)1 << until) - 1 : 0;
    return below >= 64 ? 0 : below > 0 ? not_behind >> below << below : not_behind;
  }
  __device__ __forceinline__ void set(int word, uint32_t ones) const {
    if (ones) atomicOr(words + word, ones);
  }

  // Sets the bit at + i + upper(i) for some of eight neighbours: most often all within the two words from the lowest one on.
  template <class Upper> __device__ __forceinline__ void set(int at, int first, int last, Upper upper) const {
    constexpr int kNowhere = 1 << 30;
    int bit[kGroup], lowest = kNowhere;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      bit[i] = i >= first && i < last ? at + i + upper(i) : kNowhere;
      lowest = min(lowest, bit[i]);
    }
    int word = lowest >> 5;
    uint64_t ones = 0;
    bool far = false;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      int from_word = bit[i] - word * 32;
      ones |= from_word < 64 ? (uint64_t)1 << from_word : 0;
      far = far || (from_word >= 64 && bit[i] < kNowhere);
    }
    ones &= here(word * 32);
    set(word, (uint32_t)ones);
    set(word + 1, (uint32_t)(ones >> 32));
    if (!far) return;
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (bit[i] - word * 32 >= 64 && (uint32_t)bit[i] - begin < bits) set(bit[i] >> 5, 1u << (bit[i] & 31));
  }
};

__global__ void __launch_bounds__(kPackThreads, kPackBlocks) pack(Pack op) {
  __shared__ uint4 stage[kWindow / 16 + 1];
  int64_t tile = blockIdx.x, start = op.start(tile), next = op.start(tile + 1);
  int shift = 16 - op.bits;
#pragma unroll
  for (int i = 0; i < kWindow / 16 + 1; i += kPackThreads)
    if (i + threadIdx.x < kWindow / 16 + 1) stage[i + threadIdx.x] = uint4{0, 0, 0, 0};
  __syncthreads();
  // The last byte may have room for seven entries of the next tiles, one for each of seven threads that have least to do.
  int64_t guest = next + threadIdx.x - (kPackThreads - (kByte - 1)), guest_bit = -1;
  if (threadIdx.x >= kPackThreads - (kByte - 1) && guest < op.k) {
    int64_t upper = op.index.base[op.index.begin + guest] >> op.bits, of = tile + 1;
    // Or a tile after it, which is too far away as well.
    of += guest >= op.start(tile + 2);
    if (shift < 3)  // else the second tile is too far away
#pragma unroll
      for (int i = 3; i <= kByte; ++i) of += guest >= op.start(tile + i);
    guest_bit = (of << shift) + upper + guest;
  }
  int64_t end = op.byte_after(tile + 1, next);
  for (int64_t byte = op.byte_after(tile, start); byte < end; byte += kWindow) {
    int bytes = (int)min(end - byte, (int64_t)kWindow);
    Cells<uint8_t> cells(op.high + byte, bytes);
    Window window{reinterpret_cast<uint32_t*>(stage), (uint32_t)cells.begin * 8, (uint32_t)bytes * 8};
    int64_t origin = (byte - cells.begin) * 8 - (tile << shift);  // an entry would be the first bit there, with no zeros of the tile before it
    // The entries of the tile that may be here.
    int64_t first = max(start, origin - (1 << shift)), last = min(next, origin + cells.end * 8);
    int64_t first_cell = (op.index.begin + first) / 8, entry = first_cell * 8 - op.index.begin;  // the first of that cell
    int at = (int)(entry - origin), skipped = (int)(first - entry), until = (int)max(last - entry, (int64_t)0);
    for (int begin = threadIdx.x; begin * 8 < until; begin += kPackAhead * kPackThreads) {
      uint4 v[kPackAhead];
#pragma unroll
      for (int j = 0; j < kPackAhead; ++j)
        if ((begin + j * kPackThreads) * 8 < until) v[j] = op.index.load(first_cell + begin + j * kPackThreads);
#pragma unroll
      for (int j = 0; j < kPackAhead; ++j) {
        int ahead = (begin + j * kPackThreads) * 8;
        if (ahead >= until) break;
        uint32_t word[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
        window.set(at + ahead, skipped - ahead, until - ahead, [&](int i) { return (int)((word[i / 2] >> (i % 2 * 16) & 0xffff) >> op.bits); });
      }
    }
    if (guest_bit >= byte * 8 && guest_bit < (byte + bytes) * 8) {
      int bit = (int)(guest_bit - (byte - cells.begin) * 8);
      window.set(bit / 32, 1u << (bit % 32));
    }
    __syncthreads();
    for (int cell = threadIdx.x; cell < cells.count(); cell += kPackThreads) {
      cells.store(cell, stage[cell]);
      stage[cell] = uint4{0, 0, 0, 0};
    }
    __syncthreads();
  }
}

}  // namespace

void run(const EliasFanoPack& op, cudaStream_t stream) {
  int64_t length = op.k + (op.n >> op.bits), tiles = ceil_div(op.n, kTile);
  if (length == 0) return;
  LAUNCH(pack, tiles, kPackThreads, stream, Pack{Cells<const uint16_t>(op.index, op.k), op.starts, op.high, op.k, tiles, length, op.bits});
  check("eliasfano_pack");
}

}  // namespace commopt::cuda
