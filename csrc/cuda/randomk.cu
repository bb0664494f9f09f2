// One element, drawn at random, of each of k strata of neighbours.
//
// Encode: a block owns consecutive whole strata, 4096 elements at most, a thread two groups of 8 of them, counted from a
// multiple of 8 so that they are aligned; the elements of others in the first and the last group are read and not used. A
// stratum is usable when none of its elements is infinite or NaN, which the block knows once all have been read. Bytes per
// value, float32 x: 4 x + 4 residual read, 4 residual written, and 4 k / n of values.
// Longer strata take several kernels and are read twice, 20 bytes per value: draw_values writes what is drawn, spoil a NaN
// where a stratum is not usable, keep_rest the residual of the others, and forget_drawn that of the drawn elements.
//
// Decode: a block owns 4096 elements of out. It has them in shared memory, zero, adds the rows of the elements drawn among
// them, and writes them once. Bytes per value: 4 written, and 4 k / n of each row read.
#include "../codec/strata.h"
#include "launch.h"

namespace commopt::cuda {
namespace {

constexpr int kSpan = 2 * kGroup * kThreads;
constexpr uint32_t kWhole = (1u << kGroup) - 1;  // a group, a bit for each element

// Calls f(stratum, the element that it draws) for strata `first` to `end` - 1, in turns with the other threads. Four
// neighbours have their numbers in common, and each of them computes all four: there are few threads with a stratum.
template <class F>
__device__ __forceinline__ void each_drawn(const Strata& strata, int64_t first, int64_t end, int64_t thread, int64_t threads, F f) {
  for (int64_t s = first + thread; s < end; s += threads) {
    Philox4 four = strata.numbers(s / 4);
    uint32_t low = s & 1 ? four.word[1] : four.word[0], high = s & 1 ? four.word[3] : four.word[2];
    int64_t begin = strata.begin(s);
    f(s, begin + drawn_by(s & 2 ? high : low, strata.begin(s + 1) - begin));
  }
}

// The strata of a block, counted from the first, and its elements, counted from `frame`.
struct Run {
  int64_t first, frame;
  int count, longer, size;
  int begin, end;  // of the elements

  __device__ __forceinline__ Run(const Strata& strata, int64_t k, int most) {
    first = (int64_t)blockIdx.x * most;
    count = (int)min((int64_t)most, k - first);
    longer = (int)max((int64_t)0, min((int64_t)count, strata.longer - first));
    size = (int)strata.size;
    int64_t element = strata.begin(first);
    begin = (int)(element % kGroup);
    frame = element - begin;
    end = begin_of(count);
  }
  __device__ __forceinline__ int begin_of(int s) const { return begin + s * size + min(s, longer); }
  __device__ __forceinline__ int length(int s) const { return size + (s < longer); }
  __device__ __forceinline__ int of(int element) const {
    int at = max(element - begin, 0), before = longer * (size + 1);
    bool early = at < before;
    return (early ? 0 : longer) + (int)((unsigned)(early ? at : at - before) / (unsigned)(size + early));
  }
  // A bit for each element of a group that is the block's, where the group begins before `end`.
  __device__ __forceinline__ uint32_t own(int from) const { return kWhole << max(begin - from, 0) & kWhole >> max(from + kGroup - end, 0); }

  // Calls f(i, stratum) for the elements from + i of a group.
  template <class F> __device__ __forceinline__ void each(int from, F f) const {
    int s = of(from), next = begin_of(s + 1);
#pragma unroll 1
    for (int i = 0; i < kGroup; ++i) {
      if (from + i >= next) next += length(++s);
      f(i, s);
    }
  }
};

__device__ __forceinline__ bool bit_of(const uint32_t* bits, int i) { return bits[i / 32] >> (i % 32) & 1; }
__device__ __forceinline__ void set_bit(uint32_t* bits, int i) { atomicOr(&bits[i / 32], 1u << (i % 32)); }

// Where anything is infinite or NaN, the elements are looked at once more, with their strata.
template <class T> __global__ void __launch_bounds__(kThreads)
encode_runs(Gradient<T> in, Strata strata, float* values, int64_t k, bool scaled, int most) {
  __shared__ uint32_t drawn[kSpan / 32], spoiled[kSpan / 32];  // a bit for each element, and for each stratum
  Run run(strata, k, most);
  if (threadIdx.x < kSpan / 32) drawn[threadIdx.x] = spoiled[threadIdx.x] = 0;
  T x[2][kGroup];
  float old[2][kGroup], acc[2][kGroup];
#pragma unroll
  for (int j = 0; j < 2; ++j) {  // all loads before the first is waited for
    int from = (j * kThreads + threadIdx.x) * kGroup, count = from < run.end ? present(in.n, run.frame + from) : 0;
    load8(in.x + run.frame + from, in.x_aligned, count, x[j]);
    if (in.residual) load8(in.residual + run.frame + from, in.residual_aligned, count, old[j]);
  }
  float scale = *in.loss_scale, inverse = divide(1.0f, scale);
  uint32_t bad[2];  // a bit for each element
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    int from = (j * kThreads + threadIdx.x) * kGroup;
    bad[j] = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float v = widen(x[j][i]);
      acc[j][i] = canonical(in.residual ? accumulate(v, old[j][i], scale) : v);
      bad[j] |= (uint32_t)(magnitude(acc[j][i]) >= kNonFinite) << i;
    }
    bad[j] &= from < run.end ? run.own(from) : 0;
  }
  __syncthreads();
  each_drawn(strata, run.first, run.first + run.count, threadIdx.x, kThreads, [&](int64_t s, int64_t element) {
    set_bit(drawn, (int)(element - run.frame));
    float value = in.at(element, scale);  // which is in the cache now
    values[s] = scaled ? mul(value, (float)run.length((int)(s - run.first))) : value;
  });
  bool any = __syncthreads_or(bad[0] | bad[1]);
  if (any) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (bad[j])
        run.each((j * kThreads + threadIdx.x) * kGroup, [&](int i, int s) {
          if (bad[j] >> i & 1) set_bit(spoiled, s);
        });
    __syncthreads();
    for (int s = threadIdx.x; s < run.count; s += kThreads)
      if (bit_of(spoiled, s)) values[run.first + s] = float_of(kNaN);
  }
  if (!in.residual) return;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    int from = (j * kThreads + threadIdx.x) * kGroup;
    if (from >= run.end) break;
    uint32_t taken = drawn[from / 32] >> (from % 32), usable = run.own(from);
    if (any)
      run.each(from, [&](int i, int s) {
        if ((usable >> i & 1) && bit_of(spoiled, s)) usable &= ~(1u << i);
      });
    float kept[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) kept[i] = mul(taken >> i & 1 ? 0.0f : acc[j][i], inverse);
    float* to = in.residual + run.frame + from;
    if (usable == kWhole) {
      store8(to, in.residual_aligned, kGroup, kept);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if (usable >> i & 1) to[i] = kept[i];
    }
  }
}

// --- strata that are too long for a block ---

template <class T> __global__ void __launch_bounds__(kThreads) draw_values(Gradient<T> in, Strata strata, float* values, int64_t k, bool scaled) {
  float scale = *in.loss_scale;
  each_drawn(strata, 0, k, (int64_t)blockIdx.x * kThreads + threadIdx.x, (int64_t)gridDim.x * kThreads, [&](int64_t s, int64_t element) {
    float acc = in.at(element, scale);
    bool good = magnitude(acc) < kNonFinite;
    values[s] = !good ? float_of(kNaN) : scaled ? mul(acc, (float)(strata.begin(s + 1) - strata.begin(s))) : acc;
  });
}

template <class T> __global__ void __launch_bounds__(kThreads) spoil(Gradient<T> in, Strata strata, float* values) {
  int64_t first = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kGroup;
  int count = present(in.n, first);
  if (count == 0) return;
  float acc[kGroup], old[kGroup];
  in.load(first, count, *in.loss_scale, acc, old);
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (i < count && magnitude(acc[i]) >= kNonFinite) values[strata.of(first + i)] = float_of(kNaN);  // all who do write the same
}

__device__ __forceinline__ bool usable(float value) { return magnitude(value) <= kNonFinite; }  // that was drawn: it is no NaN then

template <class T> __global__ void __launch_bounds__(kThreads) keep_rest(Gradient<T> in, Strata strata, const float* values) {
  int64_t first = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kGroup;
  int count = present(in.n, first);
  if (count == 0) return;
  float scale = *in.loss_scale, inverse = divide(1.0f, scale), acc[kGroup], kept[kGroup];
  in.load(first, count, scale, acc, kept);
  int64_t s = strata.of(first), next = strata.begin(s + 1);
  bool good = usable(values[s]), good_next = next < first + count && usable(values[s + 1]);
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (first + i < next ? good : good_next) kept[i] = mul(acc[i], inverse);
  store8(in.residual + first, in.residual_aligned, count, kept, whole_warp(in.n, first));
}

__global__ void __launch_bounds__(kThreads) forget_drawn(float* residual, const float* loss_scale, Strata strata, const float* values, int64_t k) {
  float nothing = mul(0.0f, divide(1.0f, *loss_scale));
  each_drawn(strata, 0, k, (int64_t)blockIdx.x * kThreads + threadIdx.x, (int64_t)gridDim.x * kThreads, [&](int64_t s, int64_t element) {
    if (usable(values[s])) residual[element] = nothing;
  });
}

template <class T> void encode_long(const Gradient<T>& in, const Strata& strata, const RandomkEncode& op, cudaStream_t stream) {
  int64_t blocks = ceil_div(op.k, kThreads);
  LAUNCH(draw_values<T>, blocks, kThreads, stream, in, strata, op.values, op.k, op.scaled);
  LAUNCH(spoil<T>, group_blocks(in.n), kThreads, stream, in, strata, op.values);
  if (!in.residual) return;
  LAUNCH(keep_rest<T>, group_blocks(in.n), kThreads, stream, in, strata, op.values);
  LAUNCH(forget_drawn, blocks, kThreads, stream, in.residual, in.loss_scale, strata, op.values, op.k);
}

// --- decode ---

template <class T> __global__ void __launch_bounds__(kThreads) decode(T* out, bool aligned, RandomkDecodeSum op, Strata strata) {
  __shared__ float4 tile[kSpan / 4];
  __shared__ int64_t strata_of[2];  // the first, and the one after the last
  float* sum = reinterpret_cast<float*>(tile);
  int64_t begin = (int64_t)blockIdx.x * kSpan;
  int size = (int)min((int64_t)kSpan, op.out.n - begin);
  if (threadIdx.x < 2) strata_of[threadIdx.x] = strata.of(begin + (threadIdx.x ? size - 1 : 0)) + threadIdx.x;
  for (int i = threadIdx.x; i < kSpan / 4; i += kThreads) tile[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
  __syncthreads();
  each_drawn(strata, strata_of[0], strata_of[1], threadIdx.x, kThreads, [&](int64_t s, int64_t element) {
    if (element < begin || element >= begin + size) return;
    const char* value = reinterpret_cast<const char*>(op.values + s);
    float total = *reinterpret_cast<const float*>(value);
#pragma unroll 4
    for (int64_t row = 1; row < op.out.rows; ++row) total = add(total, *reinterpret_cast<const float*>(value + row * op.out.stride));
    sum[element - begin] = total;
  });
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    int i = (j * kThreads + threadIdx.x) * kGroup;
    if (i >= size) break;
    float total[kGroup];
    memcpy(total, tile + i / 4, sizeof(total));
    T result[kGroup];
#pragma unroll
    for (int e = 0; e < kGroup; ++e) narrow(result[e], mul(total[e], op.out.weight));
    store8(out + begin + i, aligned, min(kGroup, size - i), result, whole_warp(size, i));
  }
}

}  // namespace

void run(const RandomkEncode& op, cudaStream_t stream) {
  if (op.in.n == 0) return;
  Strata strata(op, op.in.n);
  with_type(op.in.dtype, [&](auto type) {
    using T = decltype(type);
    Gradient<T> in(op.in);
    int64_t most = (kSpan - (kGroup - 1)) / (strata.size + 1);  // strata of a block
    if (most > 0)
      LAUNCH(encode_runs<T>, ceil_div(op.k, most), kThreads, stream, in, strata, op.values, op.k, op.scaled, (int)most);
    else
      encode_long(in, strata, op, stream);
  });
  check("randomk_encode");
}

void run(const RandomkDecodeSum& op, cudaStream_t stream) {
  if (op.out.n == 0) return;
  with_type(op.out.dtype, [&](auto type) {
    using T = decltype(type);
    LAUNCH(decode<T>, ceil_div(op.out.n, kSpan), kThreads, stream, static_cast<T*>(op.out.out), aligned16(op.out.out), op, Strata(op, op.out.n));
  });
  check("randomk_decode_sum");
}

}  // namespace commopt::cuda
