// A list of small integers as a stream of bits.
#include <string.h>

#include "run.h"

namespace commopt::cpu {

void run(const BitsPack& op, int) {
  const uint32_t mask = (1u << op.width) - 1;
  uint8_t* to = op.packed;
  uint64_t waiting = 0;
  int bits = 0;
  for (int64_t i = 0; i < op.count; ++i) {
    waiting |= (uint64_t)((uint16_t)op.index[i] & mask) << bits;
    bits += op.width;
    if (bits >= 32) {
      memcpy(to, &waiting, 4);
      to += 4, waiting >>= 32, bits -= 32;
    }
  }
  memcpy(to, &waiting, (size_t)(bits + 7) / 8);
}

void run(const BitsUnpack& op, int) {
  const uint32_t mask = (1u << op.width) - 1;
  const uint8_t *from = op.packed, *const end = from + (op.count * op.width + 7) / 8;
  uint64_t waiting = 0;
  int bits = 0;
  for (int64_t i = 0; i < op.count; ++i) {
    if (bits < op.width) {
      uint32_t word = 0;
      if (end - from >= 4) memcpy(&word, from, 4);
      else memcpy(&word, from, (size_t)(end - from));
      waiting |= (uint64_t)word << bits;
      from += 4, bits += 32;
    }
    op.index[i] = (int16_t)(waiting & mask);
    waiting >>= op.width, bits -= op.width;
  }
}

}  // namespace commopt::cpu
