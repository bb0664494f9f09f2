// Threads for the CPU backend. Own ones, because OpenMP's hang in a forked child and at::parallel_for needs libtorch.
#pragma once
#include <stdint.h>
#include <xmmintrin.h>

namespace commopt::cpu {

// Round to nearest and keep denormals, whatever torch.set_flush_denormal or the caller chose for this thread.
struct DefaultFloats {
  unsigned saved = _mm_getcsr();
  DefaultFloats() { _mm_setcsr(0x1f80); }
  ~DefaultFloats() { _mm_setcsr(saved); }
};

// Calls task(context, i) for every i in [0, count) on at most `threads` threads, the caller among them, and returns when
// all are done. Where another caller has the pool, the tasks run on this thread alone.
void parallel(int64_t count, int threads, void (*task)(void*, int64_t), void* context);

template <class Task> void parallel(int64_t count, int threads, Task task) {
  parallel(count, threads, [](void* context, int64_t i) { (*static_cast<Task*>(context))(i); }, &task);
}

}  // namespace commopt::cpu
