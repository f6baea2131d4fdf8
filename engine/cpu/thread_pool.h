// ThreadPool: a fixed team that runs the pieces of one loop at a time.
//
// parallel_for(n, grain, fn) calls fn(begin, end) on the ranges [i * grain, (i + 1) * grain) of
// [0, n). Any thread may run any range, but the ranges are fixed. So a result that depends only on
// its range is the same for every run and every number of threads.
//
// A token of a small model is hundreds of loops of a few microseconds each; waking a thread takes
// longer than that. So waiting threads spin for kSpin before they sleep, and a loop ends when its
// ranges are done: it does not wait for a worker that the system has not run meanwhile.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace bbb::engine {

// The threads of this process that pools take by default; 0, the initial value: all cores.
void set_default_threads(int threads);

// How many threads a loop over `bytes` of memory deserves: bytes / piece_bytes, rounded up, at
// least 1, at most the default.
int threads_for(int64_t bytes, int64_t piece_bytes);

class ThreadPool {
 public:
  using Range = std::function<void(int64_t begin, int64_t end)>;

  explicit ThreadPool(int threads);  // 0: the default; the caller is one of them
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Returns when every range is done; rethrows the first exception of fn. A call from inside fn
  // runs serially on its own thread.
  void parallel_for(int64_t n, int64_t grain, const Range& fn);

 private:
  void work();
  uint64_t take_ranges();  // returns a ticket with no range left

  static constexpr std::chrono::microseconds kSpin{100};
  // A ticket is a loop's number, above, and the index of its next range, below. kClosed: the loop
  // is being set up.
  static constexpr int kIndexBits = 32;
  static constexpr uint64_t kClosed = (uint64_t{1} << kIndexBits) - 1;
  static constexpr size_t kLine = 64;  // bytes that a core takes from another's cache at once

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable started_, finished_;
  std::exception_ptr error_;
  std::atomic<bool> stop_{false}, failed_{false};
  std::atomic<int> sleeping_{0};  // workers that need started_ to wake

  // Waiting workers read the ticket alone.
  alignas(kLine) std::atomic<uint64_t> ticket_{kClosed};
  // The current loop. A worker may read these while the next loop is set up: its ticket is then
  // out of date, and it takes no range.
  alignas(kLine) std::atomic<const Range*> fn_{nullptr};
  std::atomic<int64_t> n_{0}, grain_{1};
  std::atomic<uint64_t> ranges_{0};
  alignas(kLine) std::atomic<uint64_t> done_{0};
};

}  // namespace bbb::engine
