// The CUDA backend: run(op, stream) for every op in ops.h. Launches only; never synchronizes, never allocates.
#pragma once
#include <cuda_runtime_api.h>

#include "../ops.h"

namespace commopt::cuda {

void run(const DenseEncode&, cudaStream_t);
void run(const DenseDecodeSum&, cudaStream_t);
void run(const HalfEncode&, cudaStream_t);
void run(const HalfDecodeSum&, cudaStream_t);
void run(const AbsMax&, cudaStream_t);
void run(const FloatEncode&, cudaStream_t);
void run(const FloatDecodeSum&, cudaStream_t);
void run(const QuantEncode&, cudaStream_t);
void run(const QuantDecodeSum&, cudaStream_t);
void run(const QuantResum&, cudaStream_t);
void run(const QuantAbsMax&, cudaStream_t);
void run(const QuantEncodeShared&, cudaStream_t);
void run(const QuantDecodeShared&, cudaStream_t);
void run(const TernaryEncode&, cudaStream_t);
void run(const TernaryDecodeSum&, cudaStream_t);
void run(const SignEncode&, cudaStream_t);
void run(const SignDecodeSum&, cudaStream_t);
void run(const SignVote&, cudaStream_t);
void run(const HadamardEncode&, cudaStream_t);
void run(const HadamardKeep&, cudaStream_t);
void run(const HadamardDecode&, cudaStream_t);
void run(const TopkEncode&, cudaStream_t);
void run(const ThresholdEncode&, cudaStream_t);
void run(const TopkDecodeSum&, cudaStream_t);
void run(const SparseAdd&, cudaStream_t);
void run(const BlockTopkEncode&, cudaStream_t);
void run(const BlockTopkDecodeSum&, cudaStream_t);
void run(const BlockTopkAdd&, cudaStream_t);
void run(const BitsPack&, cudaStream_t);
void run(const BitsUnpack&, cudaStream_t);
void run(const EliasFanoPack&, cudaStream_t);
void run(const EliasFanoUnpack&, cudaStream_t);
void run(const RandomkEncode&, cudaStream_t);
void run(const RandomkDecodeSum&, cudaStream_t);

int64_t topk_workspace(int64_t n, int64_t k);       // bytes
int64_t threshold_workspace(int64_t n, int64_t k);  // bytes

}  // namespace commopt::cuda
