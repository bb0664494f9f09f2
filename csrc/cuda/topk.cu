// The k largest magnitudes, exactly, in one pass over the gradient when all goes well.
//
// The last call left a threshold that is probably a little below this call's k-th magnitude ("carried"). One pass adds
// the residual, writes it back, and lists the few elements above the threshold ("candidates"); the exact k are then
// chosen from the lists. Nothing in the result depends on the threshold:
//
//   prepare   without a carried threshold: a histogram of all magnitudes gives one that k elements are known to reach
//   select    a block owns a tile of 4096 elements and writes its candidates, in order, into the tile's own slots. Where
//             they are too many the tile stays as it was ("raw") and later steps read x and the residual again
//   histogram three times: the exact k-th magnitude, by its upper 11, middle 10 and lower 10 bits. A warp owns some tiles
//   count     how many a warp's tiles have above the k-th magnitude and equal to it
//   emit      writes the entries in order, and puts candidates that were not chosen back into the residual
//
// If fewer than k elements reach a carried threshold, the steps after select read every element ("recover"). acc is then
// known although select wrote the residual: a candidate's is in its slot, and all others were only written where
// residual * loss_scale gives acc back to the last bit (an element where it does not is a candidate, too). So a threshold
// is carried only while loss_scale is a power of two, when next to nothing is lost.
//
// A step sees what the step before it wrote because kernels of one stream run in order; no block waits for another.
// Bytes per value, float32 x: 4 x + 4 residual read, 4 residual written, and about 30 per candidate and 70 per candidate
// that is put back. 8 more for prepare, or 36 more where a tile is raw or in a recovery.
#include "launch.h"

namespace commopt::cuda {
namespace {

using u64 = unsigned long long;

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = kThreads / 32;
constexpr int kSpan = 4096;  // elements of a tile of the selection; kTile is a multiple
constexpr int kSteps = kSpan / 32;
constexpr uint32_t kRaw = 0xffffffffu;
constexpr int kBins = 2048;
constexpr int kMostBlocks = 1024;

struct Choice {  // after some bits of the k-th magnitude are known
  uint32_t prefix;
  u64 above;  // elements whose bits are larger
};
struct Count {  // elements above the k-th magnitude, and equal to it
  u64 above, equal;
};

struct Control {
  // kept from call to call
  float carried;  // a threshold in unscaled units; 0 before the first call
  float last, margin;
  // of one call
  uint32_t proven;  // the threshold of prepare
  unsigned blocks_done;
  u64 reached;       // elements that reach the threshold
  Choice choice[3];  // [level]: after the histogram of that level
};

// The workspace, cut up. Zero before the first call; whoever consumes a histogram of `all` or the counter clears it.
struct Workspace {
  Control* control;
  u64* all;        // [kBins]: the histogram of prepare
  u64* levels;     // [3][kBins]
  Count* of_block; // [blocks]
  Count* of_warp;  // [blocks * kWarps]
  uint32_t* held;  // [tiles]: candidates in the slots of a tile, or kRaw
  float* acc;      // [tiles * slots]
  uint16_t* at;    // [tiles * slots]: element within the tile

  int64_t tiles;
  int64_t of_a_warp;  // tiles, in the steps where a warp owns tiles
  int blocks;         // of those steps
  int slots;          // per tile
  int64_t bytes;

  Workspace(uint8_t* base, int64_t n, int64_t k) {  // n, k > 0
    tiles = ceil_div(n, kSpan);
    of_a_warp = ceil_div(tiles, kMostBlocks * kWarps);
    blocks = (int)ceil_div(tiles, of_a_warp * kWarps);
    int64_t mean = ceil_div(k * kSpan, n);  // candidates cluster: leave room for many times the mean
    slots = 12 * mean >= kSpan ? kSpan : 12 * mean < 256 ? 256 : (int)(12 * mean + 63) / 64 * 64;
    uint8_t* p = base;
    auto take = [&](auto*& field, int64_t count) {
      field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(p);
      p += ceil_div(count * (int64_t)sizeof(*field), 256) * 256;
    };
    take(control, 1), take(all, kBins), take(levels, 3 * kBins), take(of_block, blocks), take(of_warp, blocks * kWarps);
    take(held, tiles), take(acc, tiles * slots), take(at, tiles * slots);
    bytes = p - base;
  }
};

template <class T> struct Task {
  Gradient<T> in;
  Workspace w;
  float* values;
  uint16_t* index;
  int64_t* starts;
  u64 k;

  // Whether this call starts from the carried threshold. Every step of a call finds the same answer.
  __device__ bool carries() const {
    uint32_t scale = in.residual ? bits_of(*in.loss_scale) : bits_of(1.0f);
    return w.control->carried > 0.0f && (scale & 0x807fffffu) == 0 && scale != 0 && scale < kNonFinite;
  }
  __device__ uint32_t threshold() const {
    uint32_t t = carries() ? magnitude(mul(w.control->carried, *in.loss_scale)) : w.control->proven;
    return min(t, kNonFinite);  // so what is not finite is always a candidate
  }
  __device__ bool recovers() const { return w.control->reached < k; }
};

template <class T> __device__ T sum_of_warp(T v) {
  for (int apart = 16; apart; apart /= 2) v += __shfl_xor_sync(kAll, v, apart);
  return v;
}

// The sum of v over the threads before this one, and in `total` over the block.
__device__ __forceinline__ u64 sum_before(u64 v, u64& total) {
  __shared__ u64 of_warp[kWarps];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u64 sum = v;
  for (int by = 1; by < 32; by *= 2) {
    u64 other = __shfl_up_sync(kAll, sum, by);
    if (lane >= by) sum += other;
  }
  if (lane == 31) of_warp[warp] = sum;
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

// The bin of the element of rank k from the top, and how many elements lie in the bins above. The block works together.
__device__ Choice choose(const u64* histogram, int bins, Choice sofar, u64 k) {
  __shared__ Choice result;
  int each = bins / kThreads, top = bins - 1 - (int)threadIdx.x * each;  // thread 0 has the highest bins
  u64 own = 0, total;
  for (int i = 0; i < each; ++i) own += __ldcg(histogram + top - i);
  u64 above = sofar.above + sum_before(own, total);
  if (above < k && k <= above + own) {
    int bin = top;
    for (u64 here; above + (here = __ldcg(histogram + bin)) < k; --bin) above += here;
    result = {sofar.prefix * bins + bin, above};
  }
  __syncthreads();
  return result;
}

// Where the bits of a level begin: 11, 10 and 10 of them.
CODEC int shift_of(int level) { return 20 - 10 * level; }

// The choice after the histogram of a level, which the step before has filled. One block records it for later steps.
template <class T> __device__ Choice choice_after(const Task<T>& task, int level) {
  Choice sofar = level ? task.w.control->choice[level - 1] : Choice{0, 0};
  Choice c = choose(task.w.levels + level * kBins, level ? 1024 : 2048, sofar, task.k);
  if (blockIdx.x == 0 && threadIdx.x == 0) task.w.control->choice[level] = c;
  return c;
}

template <class T> __global__ void __launch_bounds__(kThreads) prepare(Task<T> task) {
  Workspace& w = task.w;
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < 3 * kBins; i += kThreads) w.levels[i] = 0;
    if (threadIdx.x == 0) w.control->reached = 0;
  }
  if (task.carries()) return;
  __shared__ uint32_t histogram[kBins];
  __shared__ bool last;
  for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
  __syncthreads();
  float scale = *task.in.loss_scale, acc[kGroup], old[kGroup];
  int64_t groups = (task.in.n + kGroup - 1) / kGroup, all_threads = (int64_t)gridDim.x * kThreads;
  for (int64_t group = (int64_t)blockIdx.x * kThreads + threadIdx.x; group < groups; group += all_threads) {
    int count = present(task.in.n, group * kGroup);
    task.in.load(group * kGroup, count, scale, acc, old);
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i < count) atomicAdd(&histogram[magnitude(acc[i]) >> shift_of(0)], 1u);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads)
    if (histogram[i]) atomicAdd(&w.all[i], (u64)histogram[i]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&w.control->blocks_done, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  Choice c = choose(w.all, kBins, {0, 0}, task.k);
  for (int i = threadIdx.x; i < kBins; i += kThreads) w.all[i] = 0;
  if (threadIdx.x == 0) {
    w.control->proven = c.prefix << shift_of(0);
    w.control->blocks_done = 0;
  }
}

// A block owns a tile, a thread 16 elements of it: groups t and 256 + t.
template <class T> __global__ void __launch_bounds__(kThreads) select(Task<T> task) {
  const Gradient<T>& in = task.in;
  const Workspace& w = task.w;
  bool reversible = task.carries() && in.residual;
  uint32_t threshold = task.threshold();
  float scale = *in.loss_scale, inverse = divide(1.0f, scale);
  float acc[2][kGroup], old[kGroup];
  uint32_t candidates[2];  // a bit for each
  u64 counts = 0;          // 16 bits each: of the first groups, of the second groups, elements that reach the threshold
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
      bool reaches = magnitude(acc[j][i]) >= threshold && i < count[j];
      bool lost = reversible && bits_of(mul(mul(acc[j][i], inverse), scale)) != bits_of(acc[j][i]) && i < count[j];
      candidates[j] |= (uint32_t)(reaches || lost) << i;
      counts += (u64)reaches << 32;
    }
    counts += (u64)__popc(candidates[j]) << (16 * j);
  }
  u64 total, before = sum_before(counts, total);
  uint32_t found = (uint32_t)(total & 0xffff) + (uint32_t)(total >> 16 & 0xffff);
  bool raw = found > (uint32_t)w.slots;
  if (threadIdx.x == 0) {
    w.held[blockIdx.x] = raw ? kRaw : found;
    if (total >> 32) atomicAdd(&w.control->reached, total >> 32);
  }
  if (raw) return;
  int64_t slot = (int64_t)blockIdx.x * w.slots;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    int64_t to = slot + (j ? (total & 0xffff) + (before >> 16 & 0xffff) : before & 0xffff);
    float kept[kGroup];
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      bool chosen = candidates[j] >> i & 1;
      if (chosen) {
        w.acc[to] = acc[j][i];
        w.at[to] = (uint16_t)((j * kThreads + threadIdx.x) * kGroup + i);
        ++to;
      }
      kept[i] = mul(chosen ? 0.0f : acc[j][i], inverse);
      finite = finite && magnitude(acc[j][i]) < kNonFinite;
    }
    if (!in.residual) continue;
    if (finite) {
      store8(in.residual + first[j], in.residual_aligned, count[j], kept);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if (i < count[j] && magnitude(acc[j][i]) < kNonFinite) in.residual[first[j] + i] = kept[i];
    }
  }
}

// Calls see(element within the tile, acc, whether there is one) in the order of the elements, 32 lanes at a time: for
// the candidates of a tile, or for all its elements if it is raw or the call recovers. A warp works together.
template <class T, class See> __device__ __forceinline__ void visit(const Task<T>& task, int64_t tile, bool recover, float scale, uint32_t* listed, See see) {
  const Workspace& w = task.w;
  uint32_t held = w.held[tile], lane = threadIdx.x % 32;
  const float* acc = w.acc + tile * w.slots;
  const uint16_t* at = w.at + tile * w.slots;
  if (held != kRaw && !recover) {
    for (uint32_t j = lane; j - lane < held; j += 32) {
      bool is = j < held;
      see(is ? at[j] : 0, is ? acc[j] : 0.0f, is);
    }
    return;
  }
  bool written = held != kRaw;
  if (written) {
    __syncwarp();
    for (int i = lane; i < kSteps; i += 32) listed[i] = 0;
    __syncwarp();
    for (uint32_t j = lane; j < held; j += 32) atomicOr(&listed[at[j] / 32], 1u << (at[j] % 32));
    __syncwarp();
  }
  int64_t begin = tile * kSpan;
  uint32_t passed = 0;
  for (int step = 0; step < kSteps && begin + step * 32 < task.in.n; ++step) {
    int64_t i = begin + step * 32 + lane;
    bool is = i < task.in.n;
    uint32_t word = written ? listed[step] : 0;
    float v = 0.0f;
    if (word >> lane & 1)
      v = acc[passed + __popc(word & ((1u << lane) - 1))];
    else if (is)
      v = written && task.in.residual ? mul(task.in.residual[i], scale) : task.in.at(i, scale);
    passed += __popc(word);
    see(step * 32 + lane, v, is);
  }
}

// The tiles that a warp owns.
struct Range {
  int64_t begin, end;
  __device__ explicit Range(const Workspace& w) {
    int64_t warp = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32;
    begin = min(warp * w.of_a_warp, w.tiles);
    end = min(begin + w.of_a_warp, w.tiles);
  }
};

// The bound of 4 blocks lets ptxas use more than 40 registers, where it spilled two on sm_120.
template <class T> __global__ void __launch_bounds__(kThreads, 4) histogram(Task<T> task, int level) {
  __shared__ uint32_t bins[kBins];
  __shared__ uint32_t listed[kWarps][kSteps];
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
  Choice sofar = level ? choice_after(task, level - 1) : Choice{0, 0};
  __syncthreads();
  bool recover = task.recovers();
  float scale = *task.in.loss_scale;
  int shift = shift_of(level);
  Range own(task.w);
  for (int64_t tile = own.begin; tile < own.end; ++tile)
    visit(task, tile, recover, scale, listed[threadIdx.x / 32], [&](int, float acc, bool is) {
      uint32_t key = magnitude(acc) >> shift;
      if (!level)
        is ? (void)atomicAdd(&bins[key], 1u) : (void)0;
      else if (is && key / 1024 == sofar.prefix)
        atomicAdd(&bins[key % 1024], 1u);
    });
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads)
    if (bins[i]) atomicAdd(&task.w.levels[level * kBins + i], (u64)bins[i]);
}

template <class T> __global__ void __launch_bounds__(kThreads, 4) count(Task<T> task) {
  __shared__ uint32_t listed[kWarps][kSteps];
  uint32_t kth = choice_after(task, 2).prefix;
  bool recover = task.recovers();
  float scale = *task.in.loss_scale;
  Range own(task.w);
  Count c = {0, 0}, total;
  for (int64_t tile = own.begin; tile < own.end; ++tile)
    visit(task, tile, recover, scale, listed[threadIdx.x / 32], [&](int, float acc, bool is) {
      c.above += is && magnitude(acc) > kth;
      c.equal += is && magnitude(acc) == kth;
    });
  c = {sum_of_warp(c.above), sum_of_warp(c.equal)};
  bool leader = threadIdx.x % 32 == 0;
  if (leader) task.w.of_warp[blockIdx.x * kWarps + threadIdx.x / 32] = c;
  sum_before(leader ? c.above : 0, total.above);
  sum_before(leader ? c.equal : 0, total.equal);
  if (threadIdx.x == 0) task.w.of_block[blockIdx.x] = total;
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

template <class T> __global__ void __launch_bounds__(kThreads) emit(Task<T> task) {
  __shared__ uint32_t listed[kWarps][kSteps];
  const Workspace& w = task.w;
  Choice choice = w.control->choice[2];
  uint32_t kth = choice.prefix, lane = threadIdx.x % 32;
  u64 wanted = task.k - choice.above;  // of those equal to the k-th
  bool recover = task.recovers();
  float scale = *task.in.loss_scale, inverse = divide(1.0f, scale);

  Count mine = {0, 0}, before;
  for (unsigned b = threadIdx.x; b < blockIdx.x; b += kThreads) {
    mine.above += w.of_block[b].above;
    mine.equal += w.of_block[b].equal;
  }
  sum_before(mine.above, before.above);
  sum_before(mine.equal, before.equal);
  for (unsigned i = blockIdx.x * kWarps; i < blockIdx.x * kWarps + threadIdx.x / 32; ++i) {
    before.above += w.of_warp[i].above;
    before.equal += w.of_warp[i].equal;
  }

  Range own(w);
  for (int64_t tile = own.begin; tile < own.end; ++tile) {
    if (tile % (kTile / kSpan) == 0 && lane == 0) task.starts[tile / (kTile / kSpan)] = (int64_t)(before.above + min(before.equal, wanted));
    bool settled = w.held[tile] != kRaw && !recover;  // select has already cleared the residual of the candidates
    visit(task, tile, recover, scale, listed[threadIdx.x / 32], [&](int at, float acc, bool is) {
      bool above = is && magnitude(acc) > kth, equal = is && magnitude(acc) == kth;
      unsigned lower = (1u << lane) - 1, all_above = __ballot_sync(kAll, above), all_equal = __ballot_sync(kAll, equal);
      u64 equals = before.equal + __popc(all_equal & lower), position = before.above + __popc(all_above & lower) + min(equals, wanted);
      bool chosen = above || (equal && equals < wanted);
      int64_t i = tile * kSpan + at;
      if (chosen) {
        task.values[position] = acc;
        task.index[position] = (uint16_t)i;
      }
      if (is && task.in.residual && magnitude(acc) < kNonFinite && !(chosen && settled)) task.in.residual[i] = mul(chosen ? 0.0f : acc, inverse);
      before.above += __popc(all_above);
      before.equal += __popc(all_equal);
    });
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    float unscaled = divide(float_of(kth), scale);  // the loss scale may change until the next call
    carry(*w.control, unscaled, task.carries(), recover);
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
  store8(in.residual + first, in.residual_aligned, count, kept);
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
    int64_t tiles = task.w.tiles;
    LAUNCH(prepare<T>, tiles < kMostBlocks ? tiles : kMostBlocks, kThreads, stream, task);
    LAUNCH(select<T>, tiles, kThreads, stream, task);
    for (int level = 0; level < 3; ++level) LAUNCH(histogram<T>, task.w.blocks, kThreads, stream, task, level);
    LAUNCH(count<T>, task.w.blocks, kThreads, stream, task);
    LAUNCH(emit<T>, task.w.blocks, kThreads, stream, task);
  });
  check("topk_encode");
}

}  // namespace commopt::cuda
