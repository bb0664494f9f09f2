// The k largest magnitudes, exactly, in one pass over the gradient when all goes well.
//
// The last call left a threshold that is probably a little below this call's k-th magnitude ("carried"). One pass adds
// the residual, writes it back, and lists the few elements above the threshold ("candidates"); the exact k are then
// chosen from the list. Nothing in the result depends on the threshold:
//
//   select    lists the candidates: candidates.h
//   histogram three times: the exact k-th magnitude, by its upper 11, middle 10 and lower 10 bits
//   count     how many are above the k-th magnitude and equal to it, in each chunk of the list and in each tile
//   emit      writes the entries in order, and puts candidates that were not chosen back into the residual
//
// If fewer than k elements reach a carried threshold, the steps after select read every element ("recover"). acc is then
// known although select wrote the residual: a candidate's is in the list, and all others were only written where
// residual * loss_scale gives acc back to the last bit (an element where it does not is a candidate, too). So a threshold
// is carried only while loss_scale is a power of two, when next to nothing is lost. Without one, as in the first call,
// select leaves all as it was, and it is a recovery too.
//
// A step sees what the step before it wrote because kernels of one stream run in order; no block waits for another.
// Bytes per value, float32 x: 4 x + 4 residual read, 4 residual written, and about 30 per candidate and 70 per candidate
// that is put back. 40 more where a tile is raw or in a recovery.
#include "candidates.h"
#include "choose.h"

namespace commopt::cuda {
namespace {

constexpr int kSteps = kSpan / 32;
constexpr int kBins = 2048;
constexpr int kAhead = 4;  // reads of a thread at once
constexpr int kMostBlocks = 1024;      // of the steps after select: as many as there is room for at once
constexpr int kHistogramBlocks = 264;  // fewer, because each begins and ends with all bins

// What select finds.
struct Found {
  Pool pool;
  u64 reached;  // elements that reach the threshold
};

struct Control {
  // kept from call to call
  float carried;  // a threshold in unscaled units; 0 before the first call
  float last, margin;
  // of one call
  Found found;       // zero between calls
  Found then;        // the same for emit, which clears `found`
  Choice choice[3];  // [level]: after the histogram of that level
};

// The workspace, cut up. Zero before the first call; emit clears the histograms.
struct Workspace {
  Control* control;
  u64* levels;           // [3][kBins]
  Sums sums;             // of a tile's elements above the k-th magnitude, and equal to it
  List list;
  uint16_t* of_chunk;    // [chunks]: the same of a chunk, 8 bits each
  int64_t bytes;

  Workspace(uint8_t* base, int64_t n, int64_t k) {  // n, k > 0
    Cutter cutter{base};
    cutter.take(control, 1), cutter.take(levels, 3 * kBins);
    list.take(cutter, n, k);
    sums.take(cutter, list.tiles), cutter.take(of_chunk, list.chunks);
    bytes = cutter.at - base;
  }
};

template <class T> struct Task {
  Gradient<T> in;
  Workspace w;
  float* values;
  uint16_t* index;
  int64_t* starts;
  u64 k;

  // Whether this call starts from the carried threshold.
  __device__ bool carries() const {
    uint32_t scale = in.residual ? bits_of(*in.loss_scale) : bits_of(1.0f);
    return w.control->carried > 0.0f && (scale & 0x807fffffu) == 0 && scale != 0 && scale < kNonFinite;
  }
};

template <class T> __global__ void __launch_bounds__(kThreads, 4) select(Task<T> task) {
  const Workspace& w = task.w;
  Found& found = w.control->found;
  if (threadIdx.x == 0) w.sums.clear(blockIdx.x);
  if (!task.carries()) {
    if (threadIdx.x == 0) w.list.held[blockIdx.x] = kRaw;
    return;
  }
  float scale = *task.in.loss_scale, inverse = divide(1.0f, scale);
  uint32_t threshold = min(magnitude(mul(w.control->carried, scale)), kNonFinite);  // so what is not finite is always a candidate
  bool reversible = task.in.residual;
  list_tile(
      task.in, w.list, &found.pool, scale,
      [&](float acc, int64_t) {
        bool reaches = magnitude(acc) >= threshold, lost = reversible && bits_of(mul(mul(acc, inverse), scale)) != bits_of(acc);
        return Mark{reaches || lost, reaches};
      },
      [&](uint32_t, uint32_t reached) {
        if (reached) atomicAdd(&found.reached, (u64)reached);
      });
}

// Where the bits of a level begin: 11, 10 and 10 of them.
CODEC int shift_of(int level) { return 20 - 10 * level; }

// The choice after the histogram of a level, which the step before has filled. One block records it for later steps.
template <class T> __device__ __forceinline__ Choice choice_after(const Task<T>& task, int level) {
  Choice c = level ? choose<1024>(task.w.levels + level * kBins, task.w.control->choice[level - 1], task.k)
                   : choose<2048>(task.w.levels, Choice{0, 0}, task.k);
  if (blockIdx.x == 0 && threadIdx.x == 0) task.w.control->choice[level] = c;
  return c;
}

// Calls see(element within the tile, acc, whether there is one) for all elements of a tile in their order, 32 lanes at a time,
// whether or not select wrote the tile. A warp works together.
template <class T, class See> __device__ __forceinline__ void visit(const Task<T>& task, int64_t tile, float scale, uint32_t* listed, See see) {
  const List& list = task.w.list;
  uint32_t held = list.held[tile], lane = threadIdx.x % 32;
  bool written = held != kRaw;
  int64_t begin = tile * kSpan, entries = written ? (int64_t)list.first[tile] * kChunk : 0;
  if (written) {
    __syncwarp();
    for (int i = lane; i < kSteps; i += 32) listed[i] = 0;
    __syncwarp();
    for (uint32_t j = lane; j < held; j += 32) atomicOr(&listed[list.at[entries + j] / 32], 1u << (list.at[entries + j] % 32));
    __syncwarp();
  }
  bool restored = written && task.in.residual;
  uint32_t passed = 0;
  for (int step = 0; step < kSteps && begin + step * 32 < task.in.n; step += kAhead) {
    float v[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      int64_t i = begin + (step + a) * 32 + lane;
      v[a] = i >= task.in.n ? 0.0f : restored ? mul(task.in.residual[i], scale) : task.in.at(i, scale);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      uint32_t word = written ? listed[step + a] : 0;
      if (word >> lane & 1) v[a] = list.acc[entries + passed + __popc(word & ((1u << lane) - 1))];
      passed += __popc(word);
      see((step + a) * 32 + (int)lane, v[a], begin + (step + a) * 32 + lane < task.in.n);
    }
  }
}

template <class T> __global__ void __launch_bounds__(kThreads) histogram(Task<T> task, int level) {
  __shared__ uint32_t bins[kBins];
  __shared__ uint32_t listed[kWarps][kSteps];
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
  Choice sofar = level ? choice_after(task, level - 1) : Choice{0, 0};
  __syncthreads();
  const List& list = task.w.list;
  Found found = task.w.control->found;
  bool recover = found.reached < task.k;
  int shift = shift_of(level);
  auto enter = [&](float acc) {
    uint32_t key = magnitude(acc) >> shift;
    if (!level) atomicAdd(&bins[key], 1u);
    else if (key / 1024 == sofar.prefix) atomicAdd(&bins[key % 1024], 1u);
  };
  // What fills up a chunk is 0 and changes nothing: at least k elements are as large.
  int64_t fours = recover ? 0 : list.used(found.pool) * (kChunk / 4), threads = (int64_t)gridDim.x * kThreads;
  for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < fours; i += kAhead * threads) {
    uint4 four[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (i + a * threads < fours) four[a] = reinterpret_cast<const uint4*>(list.acc)[i + a * threads];
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (i + a * threads < fours) enter(float_of(four[a].x)), enter(float_of(four[a].y)), enter(float_of(four[a].z)), enter(float_of(four[a].w));
  }
  float scale = *task.in.loss_scale;
  each_piece(list, found.pool, recover, [](int64_t) {}, [&](int64_t tile) {
    visit(task, tile, scale, listed[threadIdx.x / 32], [&](int, float acc, bool is) {
      if (is) enter(acc);
    });
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads)
    if (bins[i]) atomicAdd(&task.w.levels[level * kBins + i], (u64)bins[i]);
}

template <class T> __global__ void __launch_bounds__(kThreads) count(Task<T> task) {
  __shared__ uint32_t listed[kWarps][kSteps];
  const Workspace& w = task.w;
  uint32_t kth = choice_after(task, 2).prefix;
  Found found = w.control->found;
  if (blockIdx.x == 0 && threadIdx.x == 0) w.control->then = found;
  __shared__ u64 of_super;  // of the first chunk, and most likely of all
  const bool leader = threadIdx.x % 32 == 0, recover = found.reached < task.k;
  const Chunks own(w.list, found.pool, recover);
  const int64_t super = own.begin < own.end ? w.list.tile_of[own.begin] / 1024 : 0;
  if (threadIdx.x == 0) of_super = 0;
  __syncthreads();
  auto add_up = [&](int64_t tile, u64 numbers) {
    w.sums.add(tile, numbers);
    if (tile / 1024 == super) atomicAdd(&of_super, numbers);
    else w.sums.add_to_super(tile / 1024, numbers);
  };
  each_piece(
      w.list, found.pool, recover,
      [&](int64_t chunk) {
        int64_t entry = chunk * kChunk + threadIdx.x % 32;
        uint32_t key = magnitude(__ldg(&w.list.acc[entry]));
        bool is = __ldg(&w.list.at[entry]) != kNone;
        u64 above = __popc(__ballot_sync(kAll, is && key > kth)), equal = __popc(__ballot_sync(kAll, is && key == kth));
        if (!leader) return;
        w.of_chunk[chunk] = (uint16_t)(above | equal << 8);
        add_up(w.list.tile_of[chunk], Sums::both(above, equal));
      },
      [&](int64_t tile) {
        u64 above = 0, equal = 0;
        visit(task, tile, *task.in.loss_scale, listed[threadIdx.x / 32], [&](int, float acc, bool is) {
          above += is && magnitude(acc) > kth;
          equal += is && magnitude(acc) == kth;
        });
        above = sum_of_warp(above), equal = sum_of_warp(equal);
        if (leader) add_up(tile, Sums::both(above, equal));
      });
  __syncthreads();
  if (threadIdx.x == 0) w.sums.add_to_super(super, of_super);
}

// The threshold for the next call: below this call's k-th magnitude by a margin that follows how fast it has been falling.
__device__ void carry(Control& c, float kth, bool carried, bool recovered) {
  if (!(kth > 0.0f) || magnitude(kth) >= kNonFinite) {
    c.carried = 0.0f;
    return;
  }
  float drop = carried && c.last > 0.0f ? 1.0f - kth / c.last : 0.0f;
  float margin = !carried ? 0.05f : recovered ? fminf(0.5f, 2.0f * fmaxf(c.margin, drop)) : fmaxf(0.004f, fmaxf(1.6f * drop, 0.85f * c.margin));
  c.margin = fminf(margin, 0.5f);
  c.last = kth;
  c.carried = kth * (1.0f - c.margin);
}

// Writes entries where they belong, 32 lanes at a time. A warp works together.
template <class T> struct Emitter {
  const Task<T>& task;
  uint32_t kth;
  u64 wanted;  // of those equal to the k-th
  float inverse;

  // settled: select has already cleared the residual. before: elements above the k-th magnitude and equal to it so far.
  __device__ __forceinline__ void operator()(int64_t tile, int at, float acc, bool is, bool settled, Pair& before) const {
    bool above = is && magnitude(acc) > kth, equal = is && magnitude(acc) == kth;
    unsigned lower = (1u << threadIdx.x % 32) - 1, all_above = __ballot_sync(kAll, above), all_equal = __ballot_sync(kAll, equal);
    u64 equals = before.second + __popc(all_equal & lower), position = before.first + __popc(all_above & lower) + min(equals, wanted);
    bool chosen = above || (equal && equals < wanted);
    int64_t i = tile * kSpan + at;
    if (chosen) {
      task.values[position] = acc;
      task.index[position] = (uint16_t)i;
    }
    if (is && task.in.residual && magnitude(acc) < kNonFinite && !(chosen && settled)) task.in.residual[i] = mul(chosen ? 0.0f : acc, inverse);
    before.first += __popc(all_above);
    before.second += __popc(all_equal);
  }
};

// The same of the chunks of its tile that come before a chunk. A warp works together.
__device__ __forceinline__ Pair before_in_tile(const Workspace& w, int64_t tile, int64_t chunk) {
  uint32_t sum = 0;  // at most 4096 each
  for (int64_t c = __ldg(&w.list.first[tile]) + threadIdx.x % 32; c < chunk; c += 32) sum += (__ldg(&w.of_chunk[c]) & 0xff) | __ldg(&w.of_chunk[c]) >> 8 << 16;
  sum = __reduce_add_sync(kAll, sum);
  return {sum & 0xffff, sum >> 16};
}

template <class T> __global__ void __launch_bounds__(kThreads, 4) emit(Task<T> task) {
  __shared__ uint32_t listed[kWarps][kSteps];
  const Workspace& w = task.w;
  Choice choice = w.control->choice[2];
  Found found = w.control->then;
  bool recover = found.reached < task.k;
  float scale = *task.in.loss_scale;
  const Emitter<T> put{task, choice.prefix, task.k - choice.above, divide(1.0f, scale)};
  each_piece(
      w.list, found.pool, recover,
      [&](int64_t chunk) {
        int64_t tile = __ldg(&w.list.tile_of[chunk]), entry = chunk * kChunk + threadIdx.x % 32;
        float acc = __ldg(&w.list.acc[entry]);
        int at = __ldg(&w.list.at[entry]);
        Pair earlier = before(w.sums, tile), here = before_in_tile(w, tile, chunk);
        earlier.first += here.first, earlier.second += here.second;
        put(tile, at, acc, at != kNone, true, earlier);
      },
      [&](int64_t tile) {
        Pair earlier = before(w.sums, tile);
        visit(task, tile, scale, listed[threadIdx.x / 32], [&](int at, float acc, bool is) { put(tile, at, acc, is, false, earlier); });
      });
  int64_t warp = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32, warps = (int64_t)gridDim.x * kWarps;
  for (int64_t tile = warp; tile * kTile < task.in.n; tile += warps) {
    Pair earlier = before(w.sums, tile * (kTile / kSpan));
    if (threadIdx.x % 32 == 0) task.starts[tile] = (int64_t)(earlier.first + min(earlier.second, put.wanted));
  }
  for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < 3 * kBins; i += (int64_t)gridDim.x * kThreads) w.levels[i] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    float unscaled = divide(float_of(choice.prefix), scale);  // the loss scale may change until the next call
    carry(*w.control, unscaled, task.carries(), recover);
    w.control->found = {};
  }
}

// k = 0: the residual keeps everything.
template <class T> __global__ void __launch_bounds__(kThreads) keep(Gradient<T> in, int64_t* starts) {
  int64_t thread = (int64_t)blockIdx.x * kThreads + threadIdx.x, first = thread * kGroup;
  if (thread * kTile < in.n) starts[thread] = 0;
  int count = present(in.n, first);
  if (count == 0 || !in.residual) return;
  float scale = *in.loss_scale, inverse = divide(1.0f, scale), acc[kGroup], kept[kGroup];
  in.load(first, count, scale, acc, kept);
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (magnitude(acc[i]) < kNonFinite) kept[i] = mul(acc[i], inverse);
  store8(in.residual + first, in.residual_aligned, count, kept, whole_warp(in.n, first));
}

}  // namespace

int64_t topk_workspace(int64_t n, int64_t k) { return n && k ? Workspace(nullptr, n, k).bytes : 0; }

void run(const TopkEncode& op, cudaStream_t stream) {
  if (op.in.n == 0) return;
  with_type(op.in.dtype, [&](auto type) {
    using T = decltype(type);
    if (op.k == 0) {
      LAUNCH(keep<T>, group_blocks(op.in.n), kThreads, stream, Gradient<T>(op.in), op.starts);
      return;
    }
    Task<T> task{Gradient<T>(op.in), Workspace(op.workspace, op.in.n, op.k), op.values, op.index, op.starts, (u64)op.k};
    int64_t tiles = task.w.list.tiles;
    auto at_most = [&](int64_t blocks) { return tiles < blocks ? tiles : blocks; };
    LAUNCH(select<T>, tiles, kThreads, stream, task);
    for (int level = 0; level < 3; ++level) LAUNCH(histogram<T>, at_most(kHistogramBlocks), kThreads, stream, task, level);
    LAUNCH(count<T>, at_most(kMostBlocks), kThreads, stream, task);
    LAUNCH(emit<T>, at_most(kMostBlocks), kThreads, stream, task);
  });
  check("topk_encode");
}

}  // namespace commopt::cuda
