// The constants of the rotation: see commopt/backends/reference/hadamard.py.
#pragma once
#include "bits.h"

namespace {

constexpr float kRoot = 0.08838834764831845f;  // 2^-3.5

// The sign bit where element i of a stretch is flipped: the first 128 bits of the fraction of pi.
CODEC constexpr uint32_t flip_of(int i) {
  const uint32_t word = i < 32 ? 0x243F6A88u : i < 64 ? 0x85A308D3u : i < 96 ? 0x13198A2Eu : 0x03707344u;
  return (word >> (i % 32) & 1u) << 31;
}

}  // namespace
