// ThreadPool: a fixed team that runs the pieces of one loop at a time.
//
// parallel_for(n, grain, fn) calls fn(begin, end) on the ranges [i * grain, (i + 1) * grain) of
// [0, n). Any thread may run any range, but the ranges are fixed. So a result that depends only on
// its range is the same for every run and every number of threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace bbb::engine {

// How many threads a loop over `bytes` of memory deserves: bytes / piece_bytes, rounded up, at
// least 1, at most all cores.
int threads_for(int64_t bytes, int64_t piece_bytes);

class ThreadPool {
 public:
  using Range = std::function<void(int64_t begin, int64_t end)>;

  explicit ThreadPool(int threads);  // 0: all cores; the caller is one of them
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Returns when every range is done; rethrows the first exception of fn. A call from inside fn
  // runs serially on its own thread.
  void parallel_for(int64_t n, int64_t grain, const Range& fn);

 private:
  void work();
  void take_ranges();

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable started_, finished_;
  uint64_t round_ = 0;  // loops started; workers sleep until it changes
  int busy_ = 0;        // workers that have not yet finished the round
  bool stop_ = false;

  // The loop of this round.
  const Range* fn_ = nullptr;
  int64_t n_ = 0;
  int64_t grain_ = 1;
  std::atomic<int64_t> next_{0};
  std::exception_ptr error_;
};

}  // namespace bbb::engine
