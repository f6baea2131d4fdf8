#include "engine/cpu/thread_pool.h"

#include <algorithm>

#include "quant/check.h"

namespace bbb::engine {
namespace {
thread_local bool inside_loop = false;

// Tells the core that this thread spins.
void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Whether `done` became true within `limit`.
template <typename Done>
bool spin(std::chrono::microseconds limit, const Done& done) {
  constexpr int kPauses = 16;  // between two looks at the clock
  const auto end = std::chrono::steady_clock::now() + limit;
  do
    for (int i = 0; i < kPauses; ++i) {
      if (done()) return true;
      pause();
    }
  while (std::chrono::steady_clock::now() < end);
  return false;
}

std::atomic<int> default_threads{0};

int threads_by_default() {
  const int threads = default_threads;
  return threads > 0 ? threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}
}  // namespace

void set_default_threads(int threads) { default_threads = threads; }

int threads_for(int64_t bytes, int64_t piece_bytes) {
  const int64_t pieces = bytes / piece_bytes + (bytes % piece_bytes != 0);
  return static_cast<int>(std::clamp<int64_t>(pieces, 1, threads_by_default()));
}

ThreadPool::ThreadPool(int threads) {
  if (threads <= 0) threads = threads_by_default();
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
  const auto ranges = static_cast<uint64_t>((n - 1) / grain + 1);
  BBB_ASSERT(ranges < kClosed);
  // A worker that reads one of the new values also sees that its old ticket is gone.
  constexpr auto kRelease = std::memory_order_release;
  const uint64_t loop = (ticket_.load(std::memory_order_relaxed) >> kIndexBits) + 1;
  ticket_.store(loop << kIndexBits | kClosed, kRelease);
  fn_.store(&fn, kRelease);
  n_.store(n, kRelease);
  grain_.store(grain, kRelease);
  ranges_.store(ranges, kRelease);
  done_.store(0, kRelease);
  failed_.store(false, kRelease);
  error_ = nullptr;
  ticket_ = loop << kIndexBits;
  if (sleeping_ > 0) {
    const std::lock_guard lock(mutex_);  // a worker does not miss this between test and sleep
    started_.notify_all();
  }
  take_ranges();
  const auto finished = [&] { return done_ == ranges; };
  if (!spin(kSpin, finished)) {
    std::unique_lock lock(mutex_);
    finished_.wait(lock, finished);
  }
  if (error_) std::rethrow_exception(error_);
}

void ThreadPool::work() {
  uint64_t seen = kClosed;
  const auto started = [&] {
    const uint64_t ticket = ticket_;
    return stop_ || (ticket != seen && (ticket & kClosed) != kClosed);
  };
  for (;;) {
    if (!spin(kSpin, started)) {
      std::unique_lock lock(mutex_);
      ++sleeping_;
      started_.wait(lock, started);
      --sleeping_;
    }
    if (stop_) return;
    seen = take_ranges();
  }
}

uint64_t ThreadPool::take_ranges() {
  constexpr auto kAcquire = std::memory_order_acquire;
  inside_loop = true;
  uint64_t ticket = ticket_;
  for (;;) {
    const Range* const fn = fn_.load(kAcquire);
    const int64_t n = n_.load(kAcquire), grain = grain_.load(kAcquire);
    const uint64_t ranges = ranges_.load(kAcquire), index = ticket & kClosed;
    if (index >= ranges) break;
    // Fails if another thread took the range, or if the loop is over.
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
    const int64_t begin = static_cast<int64_t>(index) * grain;
    try {
      if (!failed_) (*fn)(begin, std::min(n, begin + grain));
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_ = true;
    }
    if (++done_ == ranges) {
      const std::lock_guard lock(mutex_);  // the caller does not miss this between test and sleep
      finished_.notify_one();
    }
    ticket = ticket_;
  }
  inside_loop = false;
  return ticket;
}

}  // namespace bbb::engine
