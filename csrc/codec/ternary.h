// Five digits of base 3 in a byte. Digit i of byte j is that of element j + i m of its block, m = block / 5.
#pragma once
#include "bits.h"

namespace {

constexpr int kDigits = 5;

// The digit that a byte holds for the i-th plane. The last is 3 in a byte above 242, which no encoder writes.
CODEC uint32_t digit_of(uint32_t byte, int i) {
  const uint32_t reciprocal = i == 0 ? 65537u : i == 1 ? 21846u : i == 2 ? 7282u : i == 3 ? 2428u : 810u;  // 2^16 / 3^i + 1
  const uint32_t rest = byte * reciprocal >> 16;
  return i == kDigits - 1 ? rest : rest - 3u * (rest * 21846u >> 16);
}

// The quotient by 3 of a byte, exactly, in 16 bits all the way.
CODEC uint16_t third(uint16_t byte) { return (uint16_t)((uint16_t)(byte * 171u) >> 9); }

}  // namespace
