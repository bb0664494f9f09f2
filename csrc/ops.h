// The ops: one struct of arguments each, the same for every native backend. commopt/backends/reference/ defines what
// they compute; commopt/backends/native.py has checked the arguments before they arrive here.
//
// x and out point to float32, bfloat16 or float16 values, as `dtype` says. residual may be null (no error feedback).
// loss_scale points to one float32 on the device of x. In a decode, `rows` messages lie `stride` bytes apart, and the
// pointers are those of row 0.
#pragma once
#include <stdint.h>

namespace commopt {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Input {  // what every encode reads and updates
  const void* x;
  int dtype;
  float* residual;
  const float* loss_scale;
  int64_t n;
};

struct Output {  // what every decode writes: weight * sum over rows, in rank order
  void* out;
  int dtype;
  float weight;
  int64_t n;
  int64_t rows, stride;
};

struct DenseEncode {
  Input in;
  void* values;     // [n] of values_dtype: float32 or bfloat16
  int values_dtype;
};
struct DenseDecodeSum {
  Output out;
  const void* values;
  int values_dtype;
};

struct HalfEncode {
  Input in;
  uint16_t* values;  // float16 [n]
  float* scales;     // [ceil(n / block)], powers of two
  int block;
};
struct HalfDecodeSum {
  Output out;
  const uint16_t* values;
  const float* scales;
  int block;
};

enum Element : int { kE4M3 = 0, kE5M2 = 1, kE2M1 = 2, kPower = 3 };
enum Scaling : int { kScaleFloat32 = 0, kScaleE8M0 = 1, kScaleE4M3 = 2 };

struct AbsMax {
  Input in;
  float* out;  // [1]
  float divisor;
};
struct FloatEncode {
  Input in;
  uint8_t* codes;       // [n]. kE2M1: [ceil(n / 2)], the even element in the low nibble
  void* scales;         // [ceil(n / block)], float32 or, other than kScaleFloat32, bytes
  const float* whole;   // [1], what the scales of kScaleE4M3 are multiplied with
  int element, scaling, block;
  bool stochastic;
  uint64_t seed;
  uint32_t step, stream;
};
struct FloatDecodeSum {
  Output out;
  const uint8_t* codes;
  const void* scales;
  const float* whole;
  int element, scaling, block;
};

struct QuantEncode {
  Input in;
  uint8_t* codes;  // 8 bits: int8 [n]. 4 bits: [ceil(n / 2)], the even element in the low nibble, stored as q + 8.
                   // 2 bits: [ceil(n / 4)], the first element lowest, stored as q + 1
  float* scales;   // [ceil(n / block)]
  int bits, block;
  bool stochastic;
  uint64_t seed;
  uint32_t step, stream;
};
struct QuantDecodeSum {
  Output out;
  const uint8_t* codes;
  const float* scales;
  int bits, block;
};

struct QuantResum {  // the sum of messages, encoded again
  QuantDecodeSum from;  // has no out
  QuantEncode to;       // has no x
};

// A scale that all ranks share, and codes that may be added up: commopt/backends/reference/quant_shared.py.
struct QuantAbsMax {
  Input in;
  uint32_t* absmax;  // [ceil(n / block)], bits of the largest magnitudes
  int block;
};
struct QuantEncodeShared {
  Input in;
  const uint32_t* absmax;
  uint8_t* codes;  // [nbytes], q + levels in `width` bits each, the first element lowest; zeros from ceil(n width / 8) on
  int64_t nbytes;
  int levels, width, block;
  bool stochastic;
  uint64_t seed;
  uint32_t step, stream;
};
struct QuantDecodeShared {
  Output out;  // rows: how many ranks' codes were added, in one row
  const uint8_t* codes;
  const uint32_t* absmax;
  int levels, width, block;
  bool stochastic;
};

struct TernaryEncode {
  Input in;
  uint8_t* codes;  // [ceil(n / block) * m], m = block / 5: byte j of a block holds its elements j + i m as the sum of 3^i (q + 1)
  float* scales;   // [ceil(n / block)]
  int block;       // 5 times a power of two from 8 to 256
  bool stochastic;
  uint64_t seed;
  uint32_t step, stream;
};
struct TernaryDecodeSum {
  Output out;
  const uint8_t* codes;
  const float* scales;
  int block;
};

struct SignEncode {
  Input in;
  uint8_t* signs;  // [ceil(n / 8)], the first element lowest, 1 where it is negative
  float* scales;   // [ceil(n / block)]
  int block;
};
struct SignDecodeSum {
  Output out;
  const uint8_t* signs;
  const float* scales;
  int block;
};

struct SignVote {  // the signs of the majority and the sum of the scales
  SignDecodeSum from;  // has no out
  uint8_t* signs;
  float* scales;
};

struct HadamardEncode {  // rotated <- H D acc
  Input in;
  float* rotated;  // [n]
};
struct HadamardKeep {  // residual <- (acc - D H rotated) / loss_scale
  Input in;
  const float* rotated;
};
struct HadamardDecode {  // out <- weight * D H rotated
  void* out;
  int dtype;
  float weight;
  int64_t n;
  const float* rotated;
};

struct TopkEncode {
  Input in;
  float* values;    // [k], in the order of their index
  uint16_t* index;  // [k], within a tile of 65536 elements
  int64_t* starts;  // [ceil(n / 65536)], position in the list where each tile begins
  int64_t k;
  uint8_t* workspace;  // workspace bytes, zero before the first call and kept by the caller between calls
  int64_t workspace_bytes;
};
struct ThresholdEncode {
  Input in;
  float* values;    // these as in TopkEncode
  uint16_t* index;
  int64_t* starts;
  int64_t k;
  int32_t* control;  // [2]: commopt/backends/reference/threshold.py
  int64_t begin;     // the element from which on the first k are chosen, going round
  uint8_t* workspace;
  int64_t workspace_bytes;
};
struct TopkDecodeSum {
  Output out;
  int64_t place_stride;  // as `stride`, of the index and starts
  const float* values;
  const uint16_t* index;
  const int64_t* starts;
  int64_t k;
};
struct SparseAdd {  // residual[selected] += values / loss_scale
  float* residual;
  const float* loss_scale;
  int64_t n;
  const float* values;
  const uint16_t* index;
  const int64_t* starts;
  int64_t k;
};

struct BlockTopkEncode {
  Input in;
  float* values;   // [count], block by block, in the order of their index
  int16_t* index;  // [count], within a block
  int64_t count;
  int k;           // of each whole block; the last one has what is left of the list
};
struct BlockTopkDecodeSum {
  Output out;
  int64_t place_stride;  // as `stride`, of the index
  const float* values;
  const int16_t* index;
  int64_t count;
  int k;
};
struct BlockTopkAdd {  // residual[selected] += values / loss_scale
  float* residual;
  const float* loss_scale;
  int64_t n;
  const float* values;
  const int16_t* index;
  int64_t count;
  int k;
};
struct BitsPack {
  const int16_t* index;  // [count]
  uint8_t* packed;       // [ceil(count * width / 8)]
  int64_t count;
  int width;             // 1 to 16
};
struct BitsUnpack {
  const uint8_t* packed;
  int16_t* index;
  int64_t count;
  int width;
};
struct EliasFanoPack {
  const uint16_t* index;  // [k], as topk_encode writes it
  const int64_t* starts;
  uint8_t* high;          // [ceil((k + (n >> bits)) / 8)]
  int64_t n, k;
  int bits;               // of an element that are not in it, 1 to 16
};
struct EliasFanoUnpack {
  const uint8_t* high;
  uint16_t* index;        // [k], with the low bits in it
  int64_t* starts;
  int64_t n, k;
  int bits;
};
struct RandomkEncode {
  Input in;
  float* values;  // [k]
  int64_t k;
  bool scaled;
  uint64_t seed;
  uint32_t step, stream;
};
struct RandomkDecodeSum {
  Output out;
  const float* values;
  int64_t k;
  uint64_t seed;
  uint32_t step, stream;
};

constexpr int64_t kTile = 65536;
constexpr int kStretch = 128;  // elements that are rotated together
constexpr int64_t kBlock = 1024, kLine = 32;  // of blocktopk: commopt/backends/reference/blocktopk.py

}  // namespace commopt
