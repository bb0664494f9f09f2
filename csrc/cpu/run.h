// The CPU backend: run(op, threads) for every op in ops.h. Same bits for every instruction set and thread count.
#pragma once
#include <string>
#include <vector>

#include "../ops.h"

namespace commopt::cpu {

void run(const DenseEncode&, int threads);
void run(const DenseDecodeSum&, int threads);
void run(const HalfEncode&, int threads);
void run(const HalfDecodeSum&, int threads);
void run(const AbsMax&, int threads);
void run(const FloatEncode&, int threads);
void run(const FloatDecodeSum&, int threads);
void run(const QuantEncode&, int threads);
void run(const QuantDecodeSum&, int threads);
void run(const QuantResum&, int threads);
void run(const QuantAbsMax&, int threads);
void run(const QuantEncodeShared&, int threads);
void run(const QuantDecodeShared&, int threads);
void run(const TernaryEncode&, int threads);
void run(const TernaryDecodeSum&, int threads);
void run(const SignEncode&, int threads);
void run(const SignDecodeSum&, int threads);
void run(const SignVote&, int threads);
void run(const HadamardEncode&, int threads);
void run(const HadamardKeep&, int threads);
void run(const HadamardDecode&, int threads);
void run(const TopkEncode&, int threads);
void run(const ThresholdEncode&, int threads);
void run(const TopkDecodeSum&, int threads);
void run(const SparseAdd&, int threads);
void run(const BlockTopkEncode&, int threads);
void run(const BlockTopkDecodeSum&, int threads);
void run(const BlockTopkAdd&, int threads);
void run(const BitsPack&, int threads);
void run(const BitsUnpack&, int threads);
void run(const EliasFanoPack&, int threads);
void run(const EliasFanoUnpack&, int threads);
void run(const RandomkEncode&, int threads);
void run(const RandomkDecodeSum&, int threads);

int64_t topk_workspace(int64_t n, int64_t k);  // bytes
int64_t threshold_workspace(int64_t n, int64_t k);
void axpy(float* r, const float* g, int64_t n, int threads);  // r += g, what the benches compare with
std::vector<std::string> isas();
std::string isa();
void use_isa(const std::string& name);

}  // namespace commopt::cpu
