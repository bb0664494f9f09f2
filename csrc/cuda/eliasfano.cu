// The upper bits of an ascending list in unary: the j-th entry, element p, sets bit (p >> bits) + j of a stream.
//
// Pack: a block owns a tile, whose entries and so whose bits of the stream begin where `starts` says, and the bytes in which
// one of these bits is the first. It makes them in shared memory and writes whole cells, zeros and ones alike. Most
// tiles take one load of `starts` and one of the index, one after the other. Bytes: 2 per entry read, and the stream written once.
//
// Unpack: a block owns neighbouring bits of the stream, one or two words a thread, and expands them into shared memory: how
// many zeros of these bits are before each one. Meanwhile it counts the ones before its bits by itself, with many loads under
// way, so there are not many blocks: these reads, from the cache, are half of the stream for each. Then it knows which
// entries are its own, and adds the upper bits to whole cells of the index. Bytes: 4 per entry, the stream once from memory
// and kMostBlocks / 2 times from the cache.
#include "cells.h"

namespace commopt::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = kThreads / 32;

// --- pack ---

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

// --- unpack ---

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
    int sum = ones;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      int other = __shfl_up_sync(kAll, sum, by);
      if (lane >= by) sum += other;
    }
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

void run(const EliasFanoPack& op, cudaStream_t stream) {
  int64_t length = op.k + (op.n >> op.bits), tiles = ceil_div(op.n, kTile);
  if (length == 0) return;
  LAUNCH(pack, tiles, kPackThreads, stream, Pack{Cells<const uint16_t>(op.index, op.k), op.starts, op.high, op.k, tiles, length, op.bits});
  check("eliasfano_pack");
}

void run(const EliasFanoUnpack& op, cudaStream_t stream) {
  if (op.n == 0) return;
  int64_t length = op.k + (op.n >> op.bits);
  Unpack unpack{Cells<const uint8_t>(op.high, ceil_div(length, 8)), op.index, op.starts, op.k, ceil_div(op.n, kTile), length, 0, 0, op.bits};
  length <= kMostBlocks / 2 * kStep<1> ? launch_unpack<1>(unpack, stream) : launch_unpack<2>(unpack, stream);
  check("eliasfano_unpack");
}

}  // namespace commopt::cuda
