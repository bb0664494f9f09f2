// What reaches a threshold, up to k values of it, and the threshold of the next call:
//
//   begin   the threshold, where none is carried by three histograms of a sample; one block
//   select  lists what reaches it, and counts it by tiles and by the distance from the threshold: candidates.h
//   emit    writes the list in order, and puts what had no room back into the residual
//
// A step sees what the step before it wrote because kernels of one stream run in order; no block waits for another.
// Bytes per value, float32 x: 4 x + 4 residual read, 4 residual written, and about 24 per candidate. 12 more where a tile is raw.
#include "../codec/threshold.h"
#include "candidates.h"
#include "choose.h"

namespace commopt::cuda {
namespace {

constexpr int64_t kSample = 65536;
constexpr int kMostBlocks = 1024;  // of emit
constexpr int kAtOnce = 8;         // elements of the sample that a thread reads before it counts them

struct Control {  // of one call
  Pool pool;
  u64 counts[kThresholdBins];  // of the distances from the threshold
  uint32_t threshold;
  uint32_t bad;                // whether anything is not finite
};

struct Workspace {
  Control* control;
  Sums sums;  // of a tile's elements that reach the threshold: from `begin` on, and before it
  List list;
  int64_t bytes;

  Workspace(uint8_t* base, int64_t n, int64_t k) {
    Cutter cutter{base};
    cutter.take(control, 1);
    list.take(cutter, n, k);
    sums.take(cutter, list.tiles);
    bytes = cutter.at - base;
  }
};

template <class T> struct Task {
  Gradient<T> in;
  Workspace w;
  float* values;
  uint16_t* index;
  int64_t* starts;
  int64_t k;
  int32_t* control;
  int64_t first;  // the element from which on the first k are chosen
};

// About the k-th largest magnitude. The block works together.
template <class T> __device__ uint32_t first_threshold(const Task<T>& task) {
  __shared__ uint32_t bins[2048];
  if (task.k == 0) return kNonFinite;
  const int64_t n = task.in.n, m = min(n, kSample), rank = max((int64_t)1, (task.k * m + n / 2) / n);
  float scale = *task.in.loss_scale;
  Choice choice = {0, 0};
  for (int level = 0; level < 3; ++level) {  // 11, 10 and 10 bits
    for (int i = threadIdx.x; i < 2048; i += kThreads) bins[i] = 0;
    __syncthreads();
    for (int64_t first = threadIdx.x; first < m; first += kAtOnce * kThreads) {
      uint32_t key[kAtOnce];
#pragma unroll
      for (int a = 0; a < kAtOnce; ++a) key[a] = magnitude(task.in.at(sampled(min(first + a * kThreads, m - 1), n, m), scale)) >> (20 - 10 * level);
#pragma unroll
      for (int a = 0; a < kAtOnce; ++a) {
        if (first + a * kThreads >= m) break;
        if (!level) atomicAdd(&bins[key[a]], 1u);
        else if (key[a] / 1024 == choice.prefix) atomicAdd(&bins[key[a] % 1024], 1u);
      }
    }
    __syncthreads();
    choice = level ? choose<1024>(bins, choice, (u64)rank) : choose<2048>(bins, choice, (u64)rank);
    __syncthreads();
  }
  return min(max(choice.prefix, 1u), kNonFinite);
}

template <class T> __global__ void __launch_bounds__(kThreads) begin(Task<T> task) {
  Control& c = *task.w.control;
  for (int64_t group = threadIdx.x; group * 32 < task.w.list.tiles; group += kThreads) task.w.sums.clear(group * 32);
  uint32_t threshold = task.control[0] ? (uint32_t)task.control[0] : first_threshold(task);
  if (threadIdx.x < kThresholdBins) c.counts[threadIdx.x] = 0;
  if (threadIdx.x == 0) c.pool = {}, c.threshold = threshold, c.bad = 0;
}

template <class T> __global__ void __launch_bounds__(kThreads, 4) select(Task<T> task) {
  __shared__ uint32_t bins[kThresholdBins];
  Control& c = *task.w.control;
  if (threadIdx.x < kThresholdBins) bins[threadIdx.x] = 0;
  uint32_t threshold = c.threshold;
  __syncthreads();
  list_tile(
      task.in, task.w.list, &c.pool, *task.in.loss_scale,
      [&](float acc, int64_t element) {
        uint32_t key = magnitude(acc);
        bool reaches = key >= threshold && element < task.in.n;
        if (reaches) atomicAdd(&bins[min((key - threshold) >> kThresholdWidth, (uint32_t)kThresholdBins - 1)], 1u);
        if (reaches && key >= kNonFinite) c.bad = 1;
        return Mark{reaches, reaches && element >= task.first};
      },
      [&](uint32_t found, uint32_t later) {
        u64 numbers = Sums::both(later, found - later);
        task.w.sums.of_tile[blockIdx.x] = 0;  // `begin` has cleared the others
        task.w.sums.add(blockIdx.x, numbers);
        task.w.sums.add_to_super(blockIdx.x / 1024, numbers);
      });
  if (threadIdx.x < kThresholdBins && bins[threadIdx.x]) atomicAdd(&c.counts[threadIdx.x], (u64)bins[threadIdx.x]);
}

// Writes what is sent. later, earlier: how many are, from task.first on, which are chosen first, and before it.
template <class T> struct Emitter {
  const Task<T>& task;
  int64_t later, earlier;
  bool bad;
  float inverse;

  // Of an element that reaches the threshold: rank counts those on its side of task.first. Whether it is sent.
  __device__ __forceinline__ bool operator()(int64_t element, float acc, int64_t rank) const {
    bool second = element >= task.first, sent = rank < (second ? later : earlier);
    if (!sent) return false;
    int64_t place = (second ? earlier : 0) + rank;
    bool tells = place == 0 && bad;  // by this entry all see that something is not finite
    task.values[place] = tells ? float_of(kNaN) : acc;
    task.index[place] = (uint16_t)element;
    return !tells;
  }

  __device__ __forceinline__ void chunk(int64_t chunk) const {
    const List& list = task.w.list;
    int64_t tile = __ldg(&list.tile_of[chunk]), lane = threadIdx.x % 32, entry = chunk * kChunk + lane;
    float acc = __ldg(&list.acc[entry]);
    uint16_t at = __ldg(&list.at[entry]);
    Pair earlier_tiles = before(task.w.sums, tile);
    if (at == kNone) return;
    int64_t element = tile * kSpan + at, place = (chunk - __ldg(&list.first[tile])) * kChunk + lane;
    int64_t rank = element >= task.first ? (int64_t)earlier_tiles.first + place - (int64_t)(__ldg(&task.w.sums.of_tile[tile]) >> 32) : (int64_t)earlier_tiles.second + place;
    bool gone = (*this)(element, acc, rank);
    if (task.in.residual && !gone && magnitude(acc) < kNonFinite) task.in.residual[element] = mul(acc, inverse);  // which select has cleared
  }

  // Of a tile that select left as it was. A warp works together.
  __device__ __forceinline__ void tile(int64_t tile, uint32_t threshold, float scale) const {
    Pair rank = before(task.w.sums, tile);
    unsigned lane = threadIdx.x % 32, lower = (1u << lane) - 1;
    for (int64_t element = tile * kSpan + lane; element - lane < min((tile + 1) * kSpan, task.in.n); element += 32) {
      bool is = element < task.in.n, second = element >= task.first;
      float acc = is ? task.in.at(element, scale) : 0.0f;
      bool reaches = is && magnitude(acc) >= threshold;
      unsigned firsts = __ballot_sync(kAll, reaches && second), seconds = __ballot_sync(kAll, reaches && !second);
      bool gone = reaches && (*this)(element, acc, (int64_t)(second ? rank.first + __popc(firsts & lower) : rank.second + __popc(seconds & lower)));
      if (is && task.in.residual && magnitude(acc) < kNonFinite) task.in.residual[element] = mul(gone ? 0.0f : acc, inverse);
      rank.first += __popc(firsts), rank.second += __popc(seconds);
    }
  }
};

template <class T> __global__ void __launch_bounds__(kThreads, 4) emit(Task<T> task) {
  const Workspace& w = task.w;
  const Control& c = *w.control;
  float scale = *task.in.loss_scale;
  Pair all = before(w.sums, w.list.tiles);
  int64_t later = min((int64_t)all.first, task.k), earlier = min((int64_t)all.second, task.k - later);
  const Emitter<T> put{task, later, earlier, c.bad != 0, divide(1.0f, scale)};
  each_piece(w.list, c.pool, false, [&](int64_t chunk) { put.chunk(chunk); }, [&](int64_t tile) { put.tile(tile, c.threshold, scale); });

  int64_t warp = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32, warps = (int64_t)gridDim.x * kWarps;
  for (int64_t tile = warp; tile * kTile < task.in.n; tile += warps) {
    Pair p = before(w.sums, tile * (kTile / kSpan));
    if (threadIdx.x % 32 == 0) task.starts[tile] = min((int64_t)p.first, later) + min((int64_t)p.second, earlier);
  }
  for (int64_t i = later + earlier + (int64_t)blockIdx.x * kThreads + threadIdx.x; i < task.k; i += (int64_t)gridDim.x * kThreads) {
    task.values[i] = 0.0f;
    task.index[i] = (uint16_t)(task.in.n - 1);
  }
  if (blockIdx.x || threadIdx.x) return;
  if (c.bad) {
    task.control[0] = task.control[1] = 0;
  } else {
    carry_threshold(task.control, c.threshold, reinterpret_cast<const int64_t*>(c.counts), task.k);
  }
}

}  // namespace

int64_t threshold_workspace(int64_t n, int64_t k) { return n ? Workspace(nullptr, n, k).bytes : 0; }

void run(const ThresholdEncode& op, cudaStream_t stream) {
  if (op.in.n == 0) return;
  with_type(op.in.dtype, [&](auto type) {
    using T = decltype(type);
    Task<T> task{Gradient<T>(op.in), Workspace(op.workspace, op.in.n, op.k), op.values, op.index, op.starts, op.k, op.control, op.begin};
    int64_t tiles = task.w.list.tiles;
    LAUNCH(begin<T>, 1, kThreads, stream, task);
    LAUNCH(select<T>, tiles, kThreads, stream, task);
    LAUNCH(emit<T>, tiles < kMostBlocks ? tiles : kMostBlocks, kThreads, stream, task);
  });
  check("threshold_encode");
}

}  // namespace commopt::cuda
