// What one instruction set provides: each op on a range of elements that begins at a multiple of its block.
#pragma once
#include "../codec/threshold.h"
#include "../ops.h"

namespace commopt::cpu {

// One thread's share of a top-k scan and the candidates it found, in the order of their index.
struct TopkPart {
  int64_t begin, end;  // elements
  int64_t done;        // those before this one have been scanned, and their residual written
  int64_t kept;        // those before this one have acc / loss_scale in the residual, x is no longer needed
  int first, last;     // chain of segments, -1: none
  int64_t found;       // candidates at or above the threshold
  uint32_t* histogram; // kBins counts of (key - threshold) >> kBinShift
};

constexpr int kBins = 2048, kBinShift = 14;  // four octaves above the threshold, the last bin takes what is higher

// Candidates live in segments that the parts draw from one store, so that no part is too small for its share.
constexpr int kSegment = 512, kGroup = 64;  // entries in a segment; elements scanned between two looks at its room
constexpr int kSlack = 16;                   // entries that a whole vector may write beyond those it means
struct Segment {
  uint32_t offset[kSegment];  // element, from the beginning of its part
  float acc[kSegment];
};
struct SegmentStore {
  Segment* segments;
  int *next, *count;
  int capacity, used;  // used: drawn atomically
};

struct TopkScan {
  TopkEncode op;
  uint32_t threshold;  // keys from here on are candidates
  uint32_t lossy;      // 1, or nonzero keys below are too: residual / loss_scale * loss_scale would not give them back
  SegmentStore* store;
};

struct TopkEmit {
  TopkEncode op;
  SegmentStore* store;
  uint32_t kth;  // key of the smallest that is sent
};

// One thread's share of a threshold scan.
constexpr int64_t kStretch = 4096;  // elements between two looks at the room of a list
struct ThresholdPart {
  int64_t begin, end;  // elements
  int64_t room;        // entries that it may keep; the list takes kStretch + kSlack more
  float* acc;
  uint32_t* offset;    // element, from the beginning of its part
  int64_t held = 0;
  int64_t bins[kThresholdBins] = {};  // all that reached the threshold, by (key - threshold) >> kThresholdWidth
  bool bad = false;    // an infinity or a NaN is among them
};

struct ThresholdScan {
  Input in;
  uint32_t threshold;
  bool often;  // many groups of elements have several that reach it
};

struct Table {
  const char* name;
  void (*dense_encode)(const DenseEncode&, int64_t begin, int64_t end);
  void (*dense_decode_sum)(const DenseDecodeSum&, int64_t begin, int64_t end);
  void (*half_encode)(const HalfEncode&, int64_t begin, int64_t end);
  void (*half_decode_sum)(const HalfDecodeSum&, int64_t begin, int64_t end);
  uint32_t (*absmax)(const AbsMax&, int64_t begin, int64_t end);  // its bits, any NaN
  void (*float_encode)(const FloatEncode&, int64_t begin, int64_t end);
  void (*float_decode_sum)(const FloatDecodeSum&, int64_t begin, int64_t end);
  void (*quant_encode)(const QuantEncode&, int64_t begin, int64_t end);
  void (*quant_decode_sum)(const QuantDecodeSum&, int64_t begin, int64_t end);
  void (*quant_resum)(const QuantResum&, float* totals, int64_t begin, int64_t end);  // totals: scratch [2 block]
  void (*quant_absmax)(const QuantAbsMax&, int64_t begin, int64_t end);
  void (*quant_encode_shared)(const QuantEncodeShared&, int64_t begin, int64_t end);
  void (*quant_decode_shared)(const QuantDecodeShared&, int64_t begin, int64_t end);
  void (*ternary_encode)(const TernaryEncode&, int64_t begin, int64_t end);
  void (*ternary_decode_sum)(const TernaryDecodeSum&, int64_t begin, int64_t end);
  void (*sign_encode)(const SignEncode&, int64_t begin, int64_t end);
  void (*sign_decode_sum)(const SignDecodeSum&, int64_t begin, int64_t end);
  void (*sign_vote)(const SignVote&, int64_t begin, int64_t end);
  void (*hadamard_encode)(const HadamardEncode&, int64_t begin, int64_t end);
  void (*hadamard_keep)(const HadamardKeep&, int64_t begin, int64_t end);
  void (*hadamard_decode)(const HadamardDecode&, int64_t begin, int64_t end);
  bool (*topk_scan)(const TopkScan&, TopkPart&);  // false: out of segments, part.done tells how far it came
  int64_t (*topk_keys)(const SegmentStore&, const TopkPart&, uint32_t low, uint32_t high, uint32_t* keys);  // of its candidates
  void (*topk_emit)(const TopkEmit&, const TopkPart&, int64_t position, int64_t ties);
  void (*threshold_scan)(const ThresholdScan&, ThresholdPart&);
  void (*topk_decode_sum)(const TopkDecodeSum&, float* tile, int64_t begin, int64_t end);  // begin: multiple of kTile; tile: scratch [kTile]
  void (*blocktopk_encode)(const BlockTopkEncode&, int64_t begin, int64_t end);  // begin: multiple of kBlock, as the end but for the last
  void (*blocktopk_decode_sum)(const BlockTopkDecodeSum&, int64_t begin, int64_t end);
  void (*randomk_encode)(const RandomkEncode&, int64_t begin, int64_t end);  // the strata that begin there
  void (*randomk_decode_sum)(const RandomkDecodeSum&, int64_t begin, int64_t end);
  void (*axpy)(float* r, const float* g, float s, int64_t begin, int64_t end);
};

extern const Table table_base, table_avx2, table_avx512;

}  // namespace commopt::cpu
