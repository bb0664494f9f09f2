// The k largest of every block of 1024.
//
// A lane holds 32 elements of the warp's block. The k-th largest of the 32 lanes' maxima is reached by at least k elements, and by
// few more, since the maxima of most lanes that reach it are alone there: those candidates go to shared memory in order, and
// the smallest are taken away until k are left. Where that does not hold (k above 32, many equal values, what is not
// finite) the k-th largest is searched for by counting. The residual is written before the search, as if nothing were sent.
// Bytes per value, float32 x: 4 x + 4 residual read, 4 residual written, and 6 + 32 k / 1024 of a chosen one.
#include "blocktopk.h"

namespace commopt::cuda {
namespace {

__device__ __forceinline__ float size_of(float v) { return float_of(magnitude(v)); }

// acc of the lane's quads, and in `held` that of the warp's elements; zeros past the end.
template <class T> __device__ __forceinline__ void load_acc(const Gradient<T>& in, const Lines& lines, float scale, Four<float> (&acc)[kQuads], float* held) {
  if (in.x_aligned && in.residual_aligned && lines.whole()) {
    Four<T> x[kQuads];
    Four<float> old[kQuads];
#pragma unroll
    for (int m = 0; m < kQuads; ++m) x[m] = quads(in.x)[lines.quad(m)];
    if (in.residual)
#pragma unroll
      for (int m = 0; m < kQuads; ++m) old[m] = quads(in.residual)[lines.quad(m)];
#pragma unroll
    for (int m = 0; m < kQuads; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m].v[i] = in.residual ? accumulate(widen(x[m].v[i]), old[m].v[i], scale) : widen(x[m].v[i]);
      quads(held)[own_quad(m)] = acc[m];
    }
  } else {
#pragma unroll 4
    for (int at = threadIdx.x % 32; at < kBlock; at += 32) held[at] = at < lines.width ? in.at(lines.element(at), scale) : 0.0f;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kQuads; ++m) acc[m] = quads(held)[own_quad(m)];
  }
}

// residual <- acc / loss_scale where acc is finite, as it is everywhere if `finite`.
__device__ __forceinline__ void keep_all(float* residual, bool aligned, const Lines& lines, float inverse, bool finite, const Four<float> (&acc)[kQuads],
                                         const float* held) {
  if (aligned && lines.whole() && finite) {
#pragma unroll
    for (int m = 0; m < kQuads; ++m) {
      Four<float> kept;
#pragma unroll
      for (int i = 0; i < 4; ++i) kept.v[i] = mul(acc[m].v[i], inverse);
      quads(residual)[lines.quad(m)] = kept;
    }
  } else {
    __syncwarp();
#pragma unroll 4
    for (int at = threadIdx.x % 32; at < lines.width; at += 32)
      if (magnitude(held[at]) < kNonFinite) residual[lines.element(at)] = mul(held[at], inverse);
  }
}

// Where the entries of a block go, and with them what the residual loses.
struct Sent {
  float* values;
  int16_t* index;
  float *residual, nothing;

  __device__ __forceinline__ void put(int position, float acc, int at, int64_t element) const {
    values[position] = acc;
    index[position] = (int16_t)at;
    if (residual && magnitude(acc) < kNonFinite) residual[element] = nothing;
  }
};

// Lane j gets the j-th largest of the lanes' values.
__device__ __forceinline__ uint32_t sort_lanes(uint32_t v) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int size = 2; size <= 32; size *= 2)
#pragma unroll
    for (int apart = size / 2; apart; apart /= 2) {
      uint32_t other = __shfl_xor_sync(kAll, v, apart);
      bool larger = ((lane & apart) == 0) == ((lane & size) == 0);
      v = larger ? max(v, other) : min(v, other);
    }
  return v;
}

// Bit i: whether element i of the lane, which is finite, is larger than `below`: the sign of an exact comparison, shifted in.
__device__ __forceinline__ uint32_t larger(const Four<float> (&acc)[kQuads], float below) {
  uint32_t mask = 0;
#pragma unroll
  for (int i = kOwn - 1; i >= 0; --i) mask = __funnelshift_l(bits_of(sub(below, size_of(acc[i / 4].v[i % 4]))), mask, 1);
  return mask;
}

// listed <- the elements that the masks of the lanes name, at most 32 in all, in their order.
__device__ __forceinline__ void list(uint32_t mask, uint16_t* listed) {
  int lane = threadIdx.x % 32;
  uint32_t pairs = mask - (mask >> 1 & 0x55555555u), quads = (pairs & 0x33333333u) + (pairs >> 2 & 0x33333333u);
  uint32_t even = quads & 0x0f0f0f0fu, odd = quads >> 4 & 0x0f0f0f0fu;  // a byte for how many each quad has
  uint32_t evens = even, odds = odd;                                     // of the lanes up to this one
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    uint32_t e = __shfl_up_sync(kAll, evens, by), o = __shfl_up_sync(kAll, odds, by);
    if (lane >= by) evens += e, odds += o;
  }
  uint32_t all_even = __shfl_sync(kAll, evens, 31), all_odd = __shfl_sync(kAll, odds, 31);
  uint32_t before = (all_even + all_odd) * 0x01010101u << 8;  // in the pairs of quads before each
  uint32_t next[2] = {before + evens - even, before + all_even + odds - odd};
  for (; mask; mask &= mask - 1) {
    int bit = __ffs((int)mask) - 1, shift = bit / 8 * 8;
    bool is_odd = bit & 4;
    uint32_t position = (is_odd ? next[1] : next[0]) >> shift & 0xff;
    listed[position] = (uint16_t)(own_quad(bit / 4) * 4 + bit % 4);
    next[0] += is_odd ? 0u : 1u << shift;
    next[1] += is_odd ? 1u << shift : 0u;
  }
}

// Sends the k largest of the `count` listed elements. A lane has one.
__device__ __forceinline__ void send_listed(const Lines& lines, const Sent& sent, const float* held, const uint16_t* listed, int count, int k) {
  int lane = threadIdx.x % 32;
  bool chosen = lane < count;
  int at = chosen ? listed[lane] : 0;
  float acc = held[at];
  for (; count > k; --count) {  // the smallest goes, of equal ones the last
    uint32_t key = chosen ? magnitude(acc) : kAll;
    unsigned least = __ballot_sync(kAll, key == __reduce_min_sync(kAll, key));
    if (lane == 31 - __clz((int)least)) chosen = false;
  }
  unsigned all = __ballot_sync(kAll, chosen);
  if (chosen) sent.put(__popc(all & ((1u << lane) - 1)), acc, at, lines.element(at));
}

struct Kth {
  uint32_t key;  // the keys above it are chosen,
  int ties;      // and so many of those equal to it
};

// The k-th largest key of a warp's elements.
__device__ __forceinline__ Kth search(const uint32_t (&key)[kOwn], int k) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) most = max(most, key[i]);
  // At least k keys reach `low`, and `above` of them, fewer than k, reach `high`. From the largest it is few octaves down.
  uint32_t low = 0, high = __reduce_max_sync(kAll, most) + 1, step = 1u << 23;
  int above = 0;
  while (high - low > 1) {
    uint32_t middle = high - min((high - low + 1) / 2, step);
    int own = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own += key[i] >= middle;
    int reached = (int)__reduce_add_sync(kAll, (unsigned)own);
    if (reached == k) return {middle - 1, 0};
    if (reached > k) {
      low = middle;
      step = kAll;
    } else {
      high = middle;
      above = reached;
      step = max(step, step * 2);
    }
  }
  return {low, k - above};
}

// Sends the k largest of all elements. Those that there are not are zeros at the end, the last that would be chosen.
__device__ __forceinline__ void send_largest(const Lines& lines, const Sent& sent, const float* held, int k) {
  uint32_t key[kOwn];
#pragma unroll
  for (int m = 0; m < kQuads; ++m) {
    Four<float> acc = quads(held)[own_quad(m)];
#pragma unroll
    for (int i = 0; i < 4; ++i) key[4 * m + i] = magnitude(canonical(acc.v[i]));
  }
  Kth kth = search(key, k);
  uint32_t passed = 0;  // 16 bits each: of the elements before, how many are above the k-th key, and equal to it
#pragma unroll 1
  for (int m = 0; m < kQuads; ++m) {
    Four<float> acc = quads(held)[own_quad(m)];
    uint32_t own[4], sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc.v[i] = canonical(acc.v[i]);
      own[i] = magnitude(acc.v[i]) > kth.key ? 1u : magnitude(acc.v[i]) == kth.key ? 1u << 16 : 0u;
      sum += own[i];
    }
    uint32_t upto = sum_upto(sum), before = passed + upto - sum;
    passed += __shfl_sync(kAll, upto, 31);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int above = (int)(before & 0xffff), equal = (int)(before >> 16), at = own_quad(m) * 4 + i;
      if (own[i] == 1 || (own[i] && equal < kth.ties)) sent.put(above + min(equal, kth.ties), acc.v[i], at, lines.element(at));
      before += own[i];
    }
  }
}

template <class T> __global__ void __launch_bounds__(kBlockThreads, 4) encode(Gradient<T> in, float* values, int16_t* index, int64_t count, int k) {
  alignas(16) __shared__ float all_held[kBlockWarps][kBlock];
  __shared__ uint16_t all_listed[kBlockWarps][32];
  float* held = all_held[threadIdx.x / 32];
  uint16_t* listed = all_listed[threadIdx.x / 32];
  Block block(in.n);
  Lines lines = block.lines(in.n);
  if (lines.width == 0) return;
  float scale = *in.loss_scale;
  Four<float> acc[kQuads];
  load_acc(in, lines, scale, acc, held);
  float most[4] = {}, sum[4] = {}, inverse = divide(1.0f, scale);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    float size = size_of(acc[i / 4].v[i % 4]);
    most[i % 4] = fmaxf(most[i % 4], size);
    sum[i % 4] = add(sum[i % 4], size);
  }
  // Where the sum is finite all values are; one that overflows is taken for one that holds another value.
  bool finite = magnitude(add(add(sum[0], sum[1]), add(sum[2], sum[3]))) < kNonFinite;
  finite = __ballot_sync(kAll, finite) == kAll;
  if (in.residual) keep_all(in.residual, in.residual_aligned, lines, inverse, finite, acc, held);
  int wanted = block.entries(count, k);
  if (wanted == 0) return;
  Sent sent{values + block.number * k, index + block.number * k, in.residual, mul(0.0f, inverse)};
  if (finite && wanted <= 32) {
    uint32_t bound = sort_lanes(bits_of(fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]))));
    bound = __shfl_sync(kAll, bound, wanted - 1);
    uint32_t mask = bound ? larger(acc, float_of(bound - 1)) : kAll;
    int candidates = (int)__reduce_add_sync(kAll, (unsigned)__popc(mask));
    if (candidates <= 32) {
      list(mask, listed);
      __syncwarp();  // the residual, too, may then be written by any lane
      send_listed(lines, sent, held, listed, candidates, wanted);
      return;
    }
  }
  __syncwarp();
  send_largest(lines, sent, held, wanted);
}

}  // namespace

void run(const BlockTopkEncode& op, cudaStream_t stream) {
  if (op.in.n == 0) return;
  with_type(op.in.dtype, [&](auto type) {
    using T = decltype(type);
    LAUNCH(encode<T>, blocks_of_threads(op.in.n), kBlockThreads, stream, Gradient<T>(op.in), op.values, op.index, op.count, op.k);
  });
  check("blocktopk_encode");
}

}  // namespace commopt::cuda
