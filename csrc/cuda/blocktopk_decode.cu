// Adding up the k largest of every block of 1024.
//
// Decode: a warp keeps the sums of its block in shared memory. 4 bytes per value written, 6 k / 1024 of each row read.
// Adding to the residual: 6 bytes per entry, and the sectors of the residual that it touches.
#include "blocktopk.h"

namespace commopt::cuda {
namespace {

// The highest index before this lane's entry, when `highest` is that before the warp's: an entry that does not lie beyond
// those before it is none. A warp works together.
__device__ __forceinline__ int highest_before(int at, bool held, int highest) {
  int lane = threadIdx.x % 32, before = __shfl_up_sync(kAll, at, 1);
  if (lane == 0) before = highest;
  if (__ballot_sync(kAll, held && at <= before)) {
    int upto = held ? at : -1;
    for (int by = 1; by < 32; by *= 2) upto = max(upto, __shfl_up_sync(kAll, upto, by));
    before = max(__shfl_up_sync(kAll, upto, 1), highest);
    if (lane == 0) before = highest;
  }
  return before;
}

struct Rising {  // the entries of a block in one row
  const int16_t* index;
  const float* values;
  int count;
  int highest = -1;  // of those that have been added

  // Whether this lane's entry is one.
  __device__ __forceinline__ bool valid(int at, bool held, int width) {
    int before = highest_before(at, held, highest);
    highest = max(highest, __reduce_max_sync(kAll, held ? at : -1));
    return held && at > before && at < width;
  }
};

__device__ __forceinline__ Rising list_of(const Block& block, const float* values, const int16_t* index, int64_t count, int k) {
  int64_t first = block.number * k;
  return {index + first, values + first, block.entries(count, k)};
}

template <class T> __global__ void __launch_bounds__(kBlockThreads, 8) decode(T* out, bool out_aligned, BlockTopkDecodeSum op) {
  alignas(16) __shared__ float sums[kBlockWarps][kBlock];
  float* sum = sums[threadIdx.x / 32];
  int lane = threadIdx.x % 32, rows = (int)op.out.rows;
  Block block(op.out.n);
  Lines lines = block.lines(op.out.n);
  if (lines.width == 0) return;
  Rising first = list_of(block, op.values, op.index, op.count, op.k);
  bool held = lane < first.count;
  clear(sum);
  if (first.count <= 32)
    add_short_lists<8>(
        rows,
        [&](int row, int& at, float& value) {
          if (held) at = row_of(first.index, row, op.place_stride)[lane], value = row_of(first.values, row, op.out.stride)[lane];
        },
        [&](int at, float value) {
          if (at > highest_before(at, held, -1) && at < lines.width) sum[at] = add(sum[at], value);
        });
  else
    add_lists<4>(
        rows,
        [&](int row) { return Rising{row_of(first.index, row, op.place_stride), row_of(first.values, row, op.out.stride), first.count}; },
        [&](Rising& list, int at, float value, bool held) {
          if (list.valid(at, held, lines.width)) sum[at] = add(sum[at], value);
        });
  write(out, out_aligned, lines, op.out.weight, sum);
}

__global__ void __launch_bounds__(kBlockThreads, 8) add_to_residual(BlockTopkAdd op) {
  Block block(op.n);
  Lines lines = block.lines(op.n);
  if (lines.width == 0) return;
  float inverse = divide(1.0f, *op.loss_scale);
  add_lists<1>(
      1, [&](int) { return list_of(block, op.values, op.index, op.count, op.k); },
      [&](Rising& list, int at, float value, bool held) {
        if (!list.valid(at, held, lines.width)) return;
        float& to = op.residual[lines.element(at)];
        to = canonical(add(to, mul(value, inverse)));
      });
}

}  // namespace

void run(const BlockTopkDecodeSum& op, cudaStream_t stream) {
  if (op.out.n == 0) return;
  with_type(op.out.dtype, [&](auto type) {
    using T = decltype(type);
    LAUNCH(decode<T>, blocks_of_threads(op.out.n), kBlockThreads, stream, static_cast<T*>(op.out.out), aligned16(op.out.out), op);
  });
  check("blocktopk_decode_sum");
}

void run(const BlockTopkAdd& op, cudaStream_t stream) {
  if (op.n == 0 || op.count == 0) return;
  LAUNCH(add_to_residual, blocks_of_threads(op.n), kBlockThreads, stream, op);
  check("blocktopk_add");
}

}  // namespace commopt::cuda
