// A list of small integers as a stream of bits.
//
// A block owns 2048 entries and the 256 * width bytes that hold them, a thread 8 entries and `width` bytes. The bytes pass
// through shared memory, where they lie as they do in the stream, so that memory sees whole 16-byte cells whatever the width
// and the alignment. Bytes per entry: 2 of the index and width / 8 of the stream, each once.
#include "cells.h"

namespace commopt::cuda {
namespace {

constexpr int kWidest = 16;
constexpr int kStage = kThreads * kWidest / 16 + 2;  // cells: one more for the alignment, and one that is read ahead

// The part of the stream that a block owns, of `bytes` in all.
template <class U> __device__ __forceinline__ Cells<U> stretch(U* stream, int64_t bytes, int width) {
  int64_t begin = (int64_t)blockIdx.x * kThreads * width;
  return {stream + begin, min((int64_t)kThreads * width, bytes - begin)};
}

__global__ void __launch_bounds__(kThreads) pack(const uint16_t* index, bool aligned, uint8_t* packed, int64_t bytes, int64_t count, int width) {
  __shared__ uint4 stage[kStage];
  Cells<uint8_t> cells = stretch(packed, bytes, width);
  int64_t first = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kGroup;
  uint16_t entry[kGroup];
  load8(index + first, aligned, present(count, first), entry);
  uint8_t* to = reinterpret_cast<uint8_t*>(stage) + cells.begin + threadIdx.x * width;
  uint32_t mask = (1u << width) - 1, waiting = 0;
  int bits = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    waiting |= (entry[i] & mask) << bits;
    bits += width;
#pragma unroll
    for (int j = 0; j < kWidest / 8; ++j)
      if (bits >= 8) *to++ = (uint8_t)waiting, waiting >>= 8, bits -= 8;
  }
  __syncthreads();
  for (int cell = threadIdx.x; cell < cells.count(); cell += kThreads) cells.store(cell, stage[cell]);
}

__global__ void __launch_bounds__(kThreads) unpack(const uint8_t* packed, int64_t bytes, uint16_t* index, bool aligned, int64_t count, int width) {
  __shared__ uint4 stage[kStage];
  Cells<const uint8_t> cells = stretch(packed, bytes, width);
  for (int cell = threadIdx.x; cell < cells.count(); cell += kThreads) stage[cell] = cells.load(cell);
  __syncthreads();
  int64_t first = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kGroup;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(stage);
  uint32_t mask = (1u << width) - 1, bit = ((uint32_t)cells.begin + threadIdx.x * width) * 8;
  uint16_t entry[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i, bit += width)
    entry[i] = (uint16_t)(((uint64_t)words[bit / 32 + 1] << 32 | words[bit / 32]) >> (bit % 32) & mask);
  store8(index + first, aligned, present(count, first), entry);
}

}  // namespace

void run(const BitsPack& op, cudaStream_t stream) {
  if (op.count == 0) return;
  const uint16_t* index = reinterpret_cast<const uint16_t*>(op.index);
  LAUNCH(pack, group_blocks(op.count), kThreads, stream, index, aligned16(index), op.packed, ceil_div(op.count * op.width, 8), op.count, op.width);
  check("bits_pack");
}

void run(const BitsUnpack& op, cudaStream_t stream) {
  if (op.count == 0) return;
  uint16_t* index = reinterpret_cast<uint16_t*>(op.index);
  LAUNCH(unpack, group_blocks(op.count), kThreads, stream, op.packed, ceil_div(op.count * op.width, 8), index, aligned16(index), op.count, op.width);
  check("bits_unpack");
}

}  // namespace commopt::cuda
