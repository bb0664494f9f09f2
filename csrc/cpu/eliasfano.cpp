// The upper bits of an ascending list in unary, a word at a time.
#include <string.h>

#include <algorithm>

#include "run.h"

namespace commopt::cpu {

void run(const EliasFanoPack& op, int) {
  const int64_t bytes = (op.k + (op.n >> op.bits) + 7) / 8, tiles = (op.n + kTile - 1) / kTile;
  memset(op.high, 0, (size_t)bytes);
  int64_t word = 0;
  uint64_t waiting = 0;
  auto flush = [&](int64_t next) {
    memcpy(op.high + word * 8, &waiting, (size_t)std::min<int64_t>(8, bytes - word * 8));
    word = next, waiting = 0;
  };
  for (int64_t tile = 0, entry = 0; tile < tiles; ++tile) {
    const int64_t end = tile + 1 < tiles ? std::min(op.starts[tile + 1], op.k) : op.k;
    for (; entry < end; ++entry) {
      const int64_t bit = ((tile * kTile + op.index[entry]) >> op.bits) + entry;
      if (bit >> 6 != word) flush(bit >> 6);
      waiting |= (uint64_t)1 << (bit & 63);
    }
  }
  if (waiting) flush(0);
}

void run(const EliasFanoUnpack& op, int) {
  const int64_t length = op.k + (op.n >> op.bits), bytes = (length + 7) / 8, tiles = (op.n + kTile - 1) / kTile;
  const uint32_t low = (1u << op.bits) - 1;
  int64_t entry = 0, tile = 0;
  auto enter = [&](int64_t bit) {
    const int64_t upper = bit - entry;
    for (; tile < tiles && tile <= upper >> (16 - op.bits); ++tile) op.starts[tile] = entry;
    op.index[entry] = (uint16_t)((uint64_t)upper << op.bits | (op.index[entry] & low));
    ++entry;
  };
  for (int64_t word = 0; word * 64 < length && entry < op.k; ++word) {
    uint64_t ones = 0;
    memcpy(&ones, op.high + word * 8, (size_t)std::min<int64_t>(8, bytes - word * 8));
    if (length - word * 64 < 64) ones &= ((uint64_t)1 << (length - word * 64)) - 1;
    for (; ones && entry < op.k; ones &= ones - 1) enter(word * 64 + __builtin_ctzll(ones));
  }
  for (int64_t bit = length; entry < op.k; ++bit) enter(bit);
  for (; tile < tiles; ++tile) op.starts[tile] = entry;
}

}  // namespace commopt::cpu
