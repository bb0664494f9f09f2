#include "pool.h"

#include <pthread.h>

#include <atomic>

namespace commopt::cpu {
namespace {

// pthread's condition variable and not std's, whose symbol needs a newer libstdc++ than the wheel promises.
class Pool {
 public:
  bool try_run(int64_t count, int threads, void (*task)(void*, int64_t), void* context) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    while (workers_ < threads - 1 && start_worker()) ++workers_;
    pthread_mutex_lock(&mutex_);
    Job job = job_ = {task, context, (uint32_t)count, job_.epoch + 1};
    places_ = threads - 1;
    done_.store(0, std::memory_order_relaxed);
    next_.store((uint64_t)job.epoch << 32, std::memory_order_release);
    pthread_mutex_unlock(&mutex_);
    for (int i = 0; i < threads - 1; ++i) pthread_cond_signal(&wake_);
    work(job);
    // What counts is that the tasks are done; a worker that slept through them may wake later and finds none.
    for (int spin = 0; spin < 2000 && done_.load(std::memory_order_acquire) < job.count; ++spin) _mm_pause();
    if (done_.load(std::memory_order_acquire) < job.count) {
      pthread_mutex_lock(&mutex_);
      while (done_.load(std::memory_order_acquire) < job.count) pthread_cond_wait(&finished_, &mutex_);
      pthread_mutex_unlock(&mutex_);
    }
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  struct Job {
    void (*task)(void*, int64_t);
    void* context;
    uint32_t count, epoch;
  };

  bool start_worker() {
    pthread_t thread;
    auto loop = [](void* pool) -> void* { static_cast<Pool*>(pool)->serve(); };
    if (pthread_create(&thread, nullptr, loop, this) != 0) return false;
    pthread_detach(thread);
    return true;
  }

  [[noreturn]] void serve() {
    DefaultFloats floats;
    uint32_t seen = 0;
    pthread_mutex_lock(&mutex_);
    for (;;) {
      while (seen == job_.epoch || places_ == 0) {
        seen = job_.epoch;
        pthread_cond_wait(&wake_, &mutex_);
      }
      Job job = job_;
      seen = job.epoch;
      --places_;
      pthread_mutex_unlock(&mutex_);
      work(job);
      pthread_mutex_lock(&mutex_);
    }
  }

  // next_ holds the epoch above the next task's number, so that a late worker cannot take a task of the following job.
  void work(const Job& job) {
    uint64_t next = next_.load(std::memory_order_acquire);
    while (next >> 32 == job.epoch && (uint32_t)next < job.count) {
      if (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acquire)) continue;
      job.task(job.context, (uint32_t)next);
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == job.count) {
        pthread_mutex_lock(&mutex_);
        pthread_cond_signal(&finished_);
        pthread_mutex_unlock(&mutex_);
      }
      next = next_.load(std::memory_order_acquire);
    }
  }

  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER, finished_ = PTHREAD_COND_INITIALIZER;
  std::atomic<bool> busy_{false};
  std::atomic<uint64_t> next_{0};
  std::atomic<uint32_t> done_{0};
  Job job_{nullptr, nullptr, 0, 0};
  int workers_ = 0, places_ = 0;
};

// Never destroyed: workers wait on it until the process ends. A forked child has none of them and starts afresh.
Pool* pool = [] {
  pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  return new Pool;
}();

}  // namespace

void parallel(int64_t count, int threads, void (*task)(void*, int64_t), void* context) {
  DefaultFloats floats;
  if (threads > count) threads = (int)count;
  if (threads > 1 && pool->try_run(count, threads, task, context)) return;
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

}  // namespace commopt::cpu
