// The 1024 elements that a warp owns: 32 lines of 32 neighbours, as far apart in memory as it may be.
//
// A lane has eight quads of four neighbours, 16 bytes of float32: quad 32 m + lane of the warp is its quad m. A load or
// store of all lanes is then four whole lines. In shared memory the elements stand in their order.
#pragma once
#include "launch.h"

namespace commopt::cuda {
namespace {

constexpr int kQuads = 8;         // of a lane
constexpr int kOwn = 4 * kQuads;  // elements of a lane

template <class T> struct alignas(4 * sizeof(T)) Four {  // moved at once
  T v[4];
};

// An array that is aligned for it, as quads. nvcc stores a quad value by value if it is addressed by its first element.
template <class T> __device__ __forceinline__ Four<T>* quads(T* p) { return reinterpret_cast<Four<T>*>(p); }
template <class T> __device__ __forceinline__ const Four<T>* quads(const T* p) { return reinterpret_cast<const Four<T>*>(p); }

// Which of the warp's quads is quad m of this lane.
__device__ __forceinline__ int own_quad(int m) { return 32 * m + (int)(threadIdx.x % 32); }

struct Lines {
  int64_t first, apart;  // line t begins at first + t * apart
  int width;             // elements that there are

  // Whether all elements are there, and then first and apart are multiples of a quad.
  __device__ __forceinline__ bool whole() const { return width == kBlock; }
  __device__ __forceinline__ int64_t element(int at) const { return first + at / (int)kLine * apart + at % (int)kLine; }
  // Where in the array, in quads, quad m of this lane is.
  __device__ __forceinline__ int64_t quad(int m) const {
    int lane = threadIdx.x % 32;
    return (first >> 2) + lane / 8 * (apart >> 2) + lane % 8 + m * apart;
  }
};

}  // namespace
}  // namespace commopt::cuda
