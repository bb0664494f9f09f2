// The upper bits of an ascending list in unary, read: the j-th entry, element p, has set bit (p >> bits) + j of a stream.
//
// A block owns neighbouring bits of the stream, one or two words a thread, and expands them into shared memory: how many zeros of
// these bits are before each one. Meanwhile it counts the ones before its bits by itself, with many loads under way, so there are
// not many blocks: these reads, from the cache, are half of the stream for each. Then it knows which entries are its own, and
// adds the upper bits to whole cells of the index. Bytes: 4 per entry, the stream once from memory and kMostBlocks / 2 times
// from the cache.
#include "cells.h"

namespace commopt::cuda {
namespace {

constexpr int64_t kMostBlocks = 128;
constexpr int kAhead = 4;  // cells of the index that a thread has read before it uses the first
constexpr int kDeep = 16;  // cells of the stream that a thread has asked for at once, an even number
template <int W> constexpr int kStep = 32 * W * kThreads;  // bits of the stream that a block expands at once

__device__ __forceinline__ uint32_t lowest(int64_t bits) { return bits >= 32 ? ~0u : bits > 0 ? (1u << bits) - 1 : 0u; }

// Which bit of v is its r-th one, counted from 1.
__device__ __forceinline__ int select(uint32_t v, int r) {
  int at = 0;
#pragma unroll
  for (int width = 16; width; width /= 2) {
    int ones = __popc(v & ((1u << width) - 1));
    if (r > ones) r -= ones, v >>= width, at += width;
  }
  return at;
}

// The ones in many words: they are added up as numbers of four bits, each in as many words, and one word in eight is counted
// (Harley and Seal), because a GPU counts a quarter as fast as it adds.
struct Ones {
  uint32_t ones, twos = 0, fours = 0, eights = 0;

  __device__ __forceinline__ static uint32_t carry(uint32_t& sum, uint32_t a, uint32_t b) {
    uint32_t over = (sum & a) | (sum & b) | (a & b);
    sum ^= a ^ b;
    return over;
  }
  __device__ __forceinline__ uint32_t four_words(uint4 v) {
    uint32_t low = carry(ones, v.x, v.y), high = carry(ones, v.z, v.w);
    return carry(twos, low, high);
  }
  __device__ __forceinline__ void add(uint4 v, uint4 w) {
    uint32_t low = four_words(v), high = four_words(w);
    eights += __popc(carry(fours, low, high));
  }
  __device__ __forceinline__ uint32_t total() const { return __popc(ones) + 2 * __popc(twos) + 4 * __popc(fours) + 8 * eights; }
};

// The ones in the first `cells` cells of the stream, all of which are whole but the very first, which is read by bytes.
struct Earlier {
  const Cells<const uint8_t>& high;
  int64_t cells, next;  // the cell from which this thread goes on
  uint4 held[kDeep];
  uint32_t byte;

  __device__ __forceinline__ Earlier(const Cells<const uint8_t>& high, int64_t cells) : high(high), cells(cells), next(1 + threadIdx.x) {
#pragma unroll
    for (int i = 0; i < kDeep; ++i) held[i] = cell(i);
    byte = threadIdx.x < 16 && cells > 0 && high.holds(0, threadIdx.x) ? high.base[threadIdx.x] : 0;
  }
  __device__ __forceinline__ uint4 cell(int i) const {
    return next + i * kThreads < cells ? high.whole_at(next + i * kThreads) : uint4{0, 0, 0, 0};
  }

  // The block works together.
  __device__ __forceinline__ int64_t count() {
    __shared__ int64_t of_warp[kWarps];
    Ones sum{byte};
    for (int64_t begin = 1; begin < cells; begin += kDeep * kThreads) {
      next += kDeep * kThreads;
#pragma unroll
      for (int i = 0; i < kDeep; i += 2) {
        sum.add(held[i], held[i + 1]);
        held[i] = cell(i), held[i + 1] = cell(i + 1);
      }
    }
    uint32_t own = sum.total();
    int64_t all = __reduce_add_sync(kAll, own & 0xffff) + ((int64_t)__reduce_add_sync(kAll, own >> 16) << 16);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = all;
    __syncthreads();
    int64_t total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total += of_warp[i];
    return total;
  }
};

template <int W> struct Words {
  uint32_t word[W];
  int64_t at;  // where in the stream the first one begins: less than 0 if the stream begins within a cell
};

struct Unpack {
  Cells<const uint8_t> high;
  uint16_t* index;
  int64_t* starts;
  int64_t k, tiles, length;
  int64_t steps, of_a_block;
  int bits;

  // This thread's words of a step. Before its first bit the stream is zeros, behind its last one it is ones.
  template <int W> __device__ __forceinline__ Words<W> words(int64_t step) const {
    int64_t word = (step * kThreads + threadIdx.x) * W;
    uint4 cell = high.load(word / 4);
    uint32_t of_cell[4] = {cell.x, cell.y, cell.z, cell.w};
    Words<W> own;
    own.at = word * 32 - high.begin * 8;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      own.word[i] = of_cell[i];
#pragma unroll
      for (int w = W; w < 4; w += W)
        if (word % 4 == w) own.word[i] = of_cell[w + i];
      own.word[i] |= ~lowest(length - own.at - 32 * i);
    }
    return own;
  }

  // A tile begins behind as many zeros as there are stretches before it. entry: the ones before these words.
  template <int W> __device__ __forceinline__ void begin_tiles(const Words<W>& own, int64_t entry) const {
    int shift = 16 - bits;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      int64_t zeros = own.at + 32 * i - entry;
      int ones = __popc(own.word[i]);
      for (int64_t tile = max((zeros >> shift) + 1, (int64_t)1); tile < tiles && (tile << shift) - zeros <= 32 - ones; ++tile) {
        int nth = (int)((tile << shift) - zeros);
        starts[tile] = min(entry + select(~own.word[i], nth) - (nth - 1), k);
      }
      entry += ones;
    }
  }

  __device__ __forceinline__ uint32_t with_low_bits(uint32_t upper, uint32_t entry) const { return (upper & 0xffff) | (entry & ((1u << bits) - 1)); }

  // The entries from `first` to `end`: their upper bits are those of `base` and of `uppers` added. The block works together.
  __device__ __forceinline__ void complete(int64_t first, int64_t end, uint32_t base, const uint4* uppers) const {
    if (first >= end) return;
    uint16_t* own = index + first;
    const uint16_t* upper = reinterpret_cast<const uint16_t*>(uppers);
    int count = (int)(end - first), head = min(count, (int)(-(reinterpret_cast<uintptr_t>(own) / 2) & 7)), cells = (count - head) / 8;
    // Up to seven entries before whole cells, and up to seven behind them.
    int edge = threadIdx.x < 8 ? threadIdx.x : head + cells * 8 + threadIdx.x - 8;
    bool has_edge = threadIdx.x < 16 && edge < (threadIdx.x < 8 ? head : count);
    uint32_t entry = has_edge ? own[edge] : 0;

    uint4* whole = reinterpret_cast<uint4*>(own + head);
    uint32_t low = ((1u << bits) - 1) * 0x10001u, both = (base & 0xffff) * 0x10001u;
    for (int begin = threadIdx.x; begin < cells; begin += kAhead * kThreads) {
      uint4 v[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (begin + j * kThreads < cells) v[j] = whole[begin + j * kThreads];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        int cell = begin + j * kThreads;
        if (cell >= cells) break;
        uint4 a = uppers[cell], b = uppers[cell + 1];
        uint32_t two[9] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, 0};  // entries a word
#pragma unroll
        for (int by = 2; by; by /= 2)
#pragma unroll
          for (int i = 0; i + by < 8; ++i)
            if (head / 2 & by) two[i] = two[i + by];
        uint32_t word[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t more = (uint32_t)(((uint64_t)two[i + 1] << 32 | two[i]) >> (head % 2 * 16));
          uint32_t sum = ((more & 0x7fff7fffu) + (both & 0x7fff7fffu)) ^ ((more ^ both) & 0x80008000u);  // of each half
          word[i] = sum | (word[i] & low);
        }
        whole[cell] = uint4{word[0], word[1], word[2], word[3]};
      }
    }
    if (has_edge) own[edge] = (uint16_t)with_low_bits(upper[edge] + base, entry);
  }
};

// Where the ones of a block's bits are.
template <int W> struct Expanded {
  uint2 words[kThreads * W];       // with the ones before it
  uint4 uppers[kStep<W> / 8 + 1];  // for each of the ones, 16 bits: the zeros before it, above the low bits of an entry

  // Returns the ones before this thread's, and in `total` all. The block works together and then has to wait for each other.
  __device__ __forceinline__ int take(const Words<W>& own, int bits, int& total) {
    __shared__ int of_warp[kWarps];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, ones = 0;
#pragma unroll
    for (int i = 0; i < W; ++i) ones += __popc(own.word[i]);
    int sum = sum_upto(ones);
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    int before = sum - ones;
    total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) before += of_warp[i];
      total += of_warp[i];
    }
    int of_word = before;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      words[threadIdx.x * W + i] = uint2{own.word[i], (uint32_t)of_word};
      of_word += __popc(own.word[i]);
    }
    __syncwarp();
    expand(warp, lane, bits);
    return before;
  }

 private:
  // A lane takes four bits at a time, so that the warp writes neighbours however dense the ones are.
  __device__ __forceinline__ void expand(int warp, int lane, int bits) {
    uint16_t* upper = reinterpret_cast<uint16_t*>(uppers);
    int begin = lane % 8 * 4;
#pragma unroll 4
    for (int j = 0; j < 8 * W; ++j) {
      int number = warp * 32 * W + j * 4 + lane / 8;
      uint2 word = words[number];
      int entry = (int)word.y + __popc(word.x & ((1u << begin) - 1)), zeros = number * 32 + begin - entry;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (word.x >> (begin + i) & 1)
          upper[entry++] = (uint16_t)(zeros << bits);
        else
          ++zeros;
      }
    }
  }
};

template <int W> __global__ void __launch_bounds__(kThreads) unpack(Unpack op) {
  __shared__ Expanded<W> expanded;
  int64_t step = (int64_t)blockIdx.x * op.of_a_block, last = min(step + op.of_a_block, op.steps), before = -1, position;
  Words<W> own = op.words<W>(step);
  Earlier earlier(op.high, step * (kStep<W> / 128));
  if (blockIdx.x == 0 && threadIdx.x == 0) op.starts[0] = 0;
  for (;;) {
    int total, mine = expanded.take(own, op.bits, total);
    if (before < 0)
      before = earlier.count();
    else
      __syncthreads();
    position = step * kStep<W> - op.high.begin * 8;
    op.begin_tiles(own, before + mine);
    op.complete(before, min(before + total, op.k), (uint32_t)(position - before) << op.bits, expanded.uppers);
    before += total;
    if (++step == last) break;
    own = op.words<W>(step);
  }
  if (last < op.steps) return;
  // Here the stream has ended. What is missing has no zeros before it but those of the stream.
  int64_t zeros = position + kStep<W> - before;
  for (int64_t tile = (zeros >> (16 - op.bits)) + 1 + threadIdx.x; tile < op.tiles; tile += kThreads) op.starts[tile] = op.k;
#pragma unroll 8
  for (int64_t i = before + threadIdx.x; i < op.k; i += kThreads) op.index[i] = (uint16_t)op.with_low_bits((uint32_t)zeros << op.bits, op.index[i]);
}

template <int W> void launch_unpack(Unpack op, cudaStream_t stream) {
  op.steps = op.length ? ceil_div(op.high.count() * 128, kStep<W>) : 1;
  op.of_a_block = ceil_div(op.steps, kMostBlocks);
  LAUNCH((unpack<W>), ceil_div(op.steps, op.of_a_block), kThreads, stream, op);
}

}  // namespace

void run(const EliasFanoUnpack& op, cudaStream_t stream) {
  if (op.n == 0) return;
  int64_t length = op.k + (op.n >> op.bits);
  Unpack unpack{Cells<const uint8_t>(op.high, ceil_div(length, 8)), op.index, op.starts, op.k, ceil_div(op.n, kTile), length, 0, 0, op.bits};
  length <= kMostBlocks / 2 * kStep<1> ? launch_unpack<1>(unpack, stream) : launch_unpack<2>(unpack, stream);
  check("eliasfano_unpack");
}

}  // namespace commopt::cuda
