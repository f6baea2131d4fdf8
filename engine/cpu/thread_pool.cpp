#include "engine/cpu/thread_pool.h"

#include <algorithm>

namespace bbb::engine {
namespace {
thread_local bool inside_loop = false;

int cores() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }
}  // namespace

int threads_for(int64_t bytes, int64_t piece_bytes) {
  const int64_t pieces = bytes / piece_bytes + (bytes % piece_bytes != 0);
  return static_cast<int>(std::clamp<int64_t>(pieces, 1, cores()));
}

ThreadPool::ThreadPool(int threads) {
  if (threads <= 0) threads = cores();
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  started_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::parallel_for(int64_t n, int64_t grain, const Range& fn) {
  if (n <= 0) return;
  if (workers_.empty() || inside_loop || n <= grain) {
    for (int64_t i = 0; i < n; i += grain) fn(i, std::min(n, i + grain));
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    fn_ = &fn;
    n_ = n;
    grain_ = grain;
    next_.store(0, std::memory_order_relaxed);
    error_ = nullptr;
    busy_ = static_cast<int>(workers_.size());
    ++round_;
  }
  started_.notify_all();
  take_ranges();
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [this] { return busy_ == 0; });
  if (error_) std::rethrow_exception(error_);
}

void ThreadPool::work() {
  uint64_t seen = 0;
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      started_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
    }
    take_ranges();
    const std::lock_guard lock(mutex_);
    if (--busy_ == 0) finished_.notify_one();
  }
}

void ThreadPool::take_ranges() {
  inside_loop = true;
  try {
    for (;;) {
      const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (begin >= n_) break;
      (*fn_)(begin, std::min(n_, begin + grain_));
    }
  } catch (...) {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::current_exception();
    next_.store(n_, std::memory_order_relaxed);
  }
  inside_loop = false;
}

}  // namespace bbb::engine
