// Runs the .cu files of csrc/cuda on a CPU, for tests: each CUDA thread is a fiber, blocks run one after another, and a
// barrier is "yield until all have arrived". Each warp, in a random order, runs as far as it can before the next one,
// so that a missing barrier shows.
// It proves logic and bits, not speed, and not what the memory model allows between blocks that run at once.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define LAUNCH(kernel, blocks, threads, stream, ...) emulator::launch((blocks), (threads), [&] { (void)(stream), (kernel)(__VA_ARGS__); })

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
#define CUDART_VERSION 0

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t kStack = 1 << 17;
constexpr unsigned kMostThreads = 256;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda_emulator: %s\n", what);
  abort();
}

struct Barrier {  // of the threads of a block or of a warp
  int expected = 0, arrived = 0;
  long generation = 0;
};
struct Warp {
  Barrier barrier;
  int lanes = 0;
  uint64_t exchange[32];
};
struct Fiber {  // started once, then switched to and from by setjmp, which unlike swapcontext makes no system call
  std::unique_ptr<char[]> stack;
  jmp_buf here;
  bool done;
  const Barrier* waits;  // for this barrier to leave that generation
  long generation;
  int vote;
};

inline Fiber fibers[kMostThreads];
inline Warp warps[kMostThreads / 32];
inline Barrier block;
inline jmp_buf scheduler;
inline const std::function<void()>* body;
inline uint64_t order = 1;

inline void yield(Fiber& self) {
  if (!_setjmp(self.here)) _longjmp(scheduler, 1);
}

inline void wait(Barrier& b) {
  if (++b.arrived == b.expected) {
    b.arrived = 0;
    ++b.generation;
    return;
  }
  Fiber& self = fibers[threadIdx.x];
  self.waits = &b;
  self.generation = b.generation;
  yield(self);
}

inline Warp& warp() {
  Warp& w = warps[threadIdx.x / 32];
  if (w.barrier.expected != w.lanes) fail("a warp operation with all lanes after one of them has returned");
  return w;
}

inline void leave(Barrier& b) {
  if (--b.expected && b.arrived == b.expected) b.arrived = 0, ++b.generation;
}

inline void life_of_a_fiber() {
  for (;;) {
    (*body)();
    leave(block);
    leave(warps[threadIdx.x / 32].barrier);
    Fiber& self = fibers[threadIdx.x];
    self.done = true;
    yield(self);
  }
}

__attribute__((noinline)) inline void resume(Fiber& f) {
  if (_setjmp(scheduler)) return;
  if (f.stack) _longjmp(f.here, 1);
  f.stack.reset(new char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = f.stack.get(), context.uc_stack.ss_size = kStack, context.uc_link = nullptr;
  makecontext(&context, life_of_a_fiber, 0);
  setcontext(&context);
}

inline void shuffle(unsigned* p, unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    p[i] = i;
    order = order * 6364136223846793005u + 1442695040888963407u;
    std::swap(p[i], p[(order >> 33) % (i + 1)]);
  }
}

__attribute__((noinline)) inline void launch(int64_t blocks, unsigned threads, const std::function<void()>& kernel) {
  if (blocks < 1 || blocks > 0x7fffffff || threads > kMostThreads || threads % 32) fail("bad launch");
  body = &kernel;
  gridDim.x = (unsigned)blocks, blockDim.x = threads;
  unsigned warp_order[kMostThreads / 32], lane_order[32];
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    shuffle(warp_order, threads / 32), shuffle(lane_order, 32);
    block = {(int)threads, 0, 0};
    for (unsigned w = 0; w < threads / 32; ++w) warps[w].barrier = {32, 0, 0}, warps[w].lanes = 32;
    for (unsigned t = 0; t < threads; ++t) fibers[t].done = false, fibers[t].waits = nullptr;
    for (unsigned left = threads; left;) {
      bool moved = false;
      for (unsigned w = 0; w < threads / 32; ++w) {
        for (bool again = true; again;) {  // as far as this warp gets: the others may be as late as the barriers allow
          again = false;
          for (unsigned lane : lane_order) {
            unsigned t = warp_order[w] * 32 + lane;
            Fiber& f = fibers[t];
            if (f.done || (f.waits && f.waits->generation == f.generation)) continue;
            f.waits = nullptr, again = moved = true, threadIdx.x = t;
            resume(f);
            left -= f.done;
          }
        }
      }
      if (!moved) fail("deadlock: threads of a block wait at different barriers");
    }
  }
}

template <class T> T exchange(T value, int from) {  // every lane gives a value and takes that of lane `from`
  Warp& w = warp();
  memcpy(&w.exchange[threadIdx.x % 32], &value, sizeof(T));
  wait(w.barrier);
  memcpy(&value, &w.exchange[from], sizeof(T));
  wait(w.barrier);
  return value;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block); }
inline int __syncthreads_or(int p) {
  emulator::fibers[threadIdx.x].vote = p;
  __syncthreads();
  int result = 0;
  for (unsigned t = 0; t < blockDim.x; ++t) result |= emulator::fibers[t].vote;
  __syncthreads();
  return result;
}
inline void __syncwarp() { emulator::wait(emulator::warp().barrier); }
template <class T> T __shfl_xor_sync(unsigned, T v, int lanes) { return emulator::exchange(v, (threadIdx.x % 32) ^ lanes); }
template <class T> T __shfl_sync(unsigned, T v, int lane) { return emulator::exchange(v, lane % 32); }
template <class T> T __shfl_up_sync(unsigned, T v, int by) {
  int lane = (int)(threadIdx.x % 32);
  return emulator::exchange(v, lane >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned, int p) {
  unsigned lane = threadIdx.x % 32, result = 0;
  emulator::Warp& w = emulator::warp();
  w.exchange[lane] = p != 0;
  emulator::wait(w.barrier);
  for (int i = 0; i < 32; ++i) result |= (unsigned)w.exchange[i] << i;
  emulator::wait(w.barrier);
  return result;
}
template <class T, class Combine> T reduce(T v, Combine combine) {
  T result = emulator::exchange(v, 0);
  for (int lane = 1; lane < 32; ++lane) result = combine(result, emulator::exchange(v, lane));
  return result;
}
inline unsigned __reduce_add_sync(unsigned, unsigned v) { return reduce(v, [](unsigned a, unsigned b) { return a + b; }); }
template <class T> T __reduce_min_sync(unsigned, T v) { return reduce(v, [](T a, T b) { return std::min(a, b); }); }
template <class T> T __reduce_max_sync(unsigned, T v) { return reduce(v, [](T a, T b) { return std::max(a, b); }); }
template <class T, class V> T atomicAdd(T* p, V v) { return *p += (T)v, *p - (T)v; }
template <class T> T atomicMax(T* p, T v) {
  T old = *p;
  *p = std::max(old, v);
  return old;
}
template <class T, class V> T atomicOr(T* p, V v) {
  T old = *p;
  *p |= (T)v;
  return old;
}
inline void __threadfence() {}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) { return (unsigned)(((uint64_t)high << 32 | low) << (by % 32) >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  uint64_t bytes = (uint64_t)y << 32 | x, result = 0;
  for (int i = 0; i < 4; ++i) result |= (bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return (unsigned)result;
}
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }
template <class T> T __ldg(const T* p) { return *p; }
using std::max;
using std::min;
