// Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// The random number of an element depends on (seed, step, stream, index) and on nothing else, so every backend,
// thread count and tiling draws the same one.
#pragma once
#include "bits.h"

namespace {

struct Philox4 {
  uint32_t word[4];
};

// Serves the eight elements 8 * group .. 8 * group + 7 with 16 bits each: element i takes half i & 1 of word (i >> 1) & 3.
CODEC Philox4 philox(uint64_t seed, uint32_t step, uint32_t stream, uint64_t group) {
  uint32_t c0 = (uint32_t)group, c1 = (uint32_t)(group >> 32), c2 = step, c3 = stream;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

CODEC uint32_t philox16(const Philox4& p, int i) { return (p.word[(i >> 1) & 3] >> (16 * (i & 1))) & 0xffffu; }

}  // namespace
