// The bits of a float32, and what the kernels ask of them. One value at a time, for host and device.
#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define CODEC __host__ __device__ __forceinline__
#else
#define CODEC inline __attribute__((always_inline))
#endif

// Everything in codec/ has internal linkage: the same header is compiled for several instruction sets,
// and a copy that the linker shares between them could carry an instruction the machine lacks.
namespace {

CODEC uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
#endif
}

CODEC float float_of(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float x;
  memcpy(&x, &u, 4);
  return x;
#endif
}

// |x| as an unsigned integer: ordered like the magnitude, with NaN above infinity above every finite value.
// Its maximum does not depend on the order in which it is taken, which a float maximum with NaN does.
CODEC uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffffu; }

constexpr uint32_t kNonFinite = 0x7f800000u;  // magnitudes from here on are infinite or NaN
constexpr uint32_t kNaN = 0x7fc00000u;        // the one NaN that is written into a message; machines differ in those they compute

CODEC float canonical(float x) { return magnitude(x) > kNonFinite ? float_of(kNaN) : x; }

// Each operation is rounded by itself. A fused multiply-add on one backend and not on another would differ in the last bit.
CODEC float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
CODEC float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
CODEC float sub(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}
CODEC float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// The gradient plus what earlier steps left over. The residual is in unscaled units, the gradient in those of the loss.
CODEC float accumulate(float gradient, float residual, float loss_scale) { return add(gradient, mul(residual, loss_scale)); }

}  // namespace
