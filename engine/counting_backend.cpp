#include "engine/counting_backend.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "engine/chunks.h"

namespace bbb::engine {

struct CountingBackend::Usage {
  std::mutex mutex;
  int64_t held_bytes = 0;
  int64_t peak_bytes = 0;
  uintptr_t next_address = uintptr_t{1} << 40;  // never dereferenced

  void hold(int64_t bytes) {
    held_bytes += bytes;
    peak_bytes = std::max(peak_bytes, held_bytes);
  }
  void* fresh_address(int64_t bytes) {
    void* const address = reinterpret_cast<void*>(next_address);
    next_address += static_cast<uintptr_t>(bytes + 511) / 512 * 512;
    return address;
  }
};

// Tensors outside recordings count while they live. Slabs of recordings count as long as any
// recording lives.
class CountingBackend::Pool : public std::enable_shared_from_this<Pool> {
 public:
  enum class Keeps { Tensors, Slabs };

  Pool(std::shared_ptr<Usage> usage, Keeps keeps) : usage_(std::move(usage)), keeps_(keeps) {}
  ~Pool() {
    const std::lock_guard lock(usage_->mutex);
    usage_->held_bytes -= slab_bytes_;
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  std::shared_ptr<Storage> allocate(int64_t bytes, int64_t block_bytes) {
    const std::lock_guard lock(usage_->mutex);
    void* block = nullptr;
    if (keeps_ == Keeps::Tensors) {
      block = usage_->fresh_address(block_bytes);
      usage_->hold(block_bytes);
    } else {
      block = chunks_.take(block_bytes, [this](int64_t slab_bytes) {
        slab_bytes_ += slab_bytes;
        usage_->hold(slab_bytes);
        return usage_->fresh_address(slab_bytes);
      });
    }
    return std::make_shared<Storage>(block, bytes, [self = shared_from_this(), block, block_bytes] {
      self->give_back(block, block_bytes);
    });
  }
  int64_t slab_bytes() const { return slab_bytes_; }

 private:
  void give_back(void* block, int64_t block_bytes) {
    const std::lock_guard lock(usage_->mutex);
    if (keeps_ == Keeps::Tensors)
      usage_->held_bytes -= block_bytes;
    else
      chunks_.give_back(block, block_bytes);
  }

  std::shared_ptr<Usage> usage_;
  Keeps keeps_;
  ChunkPool chunks_;
  int64_t slab_bytes_ = 0;
};

struct CountingBackend::RecordingPools {
  std::shared_ptr<Pool> main, side;
};

namespace {

class NoFence final : public Fence {
 public:
  void wait() override {}
};

class NoTransfers final : public Transfers {
 public:
  std::shared_ptr<Storage> host_buffer(int64_t bytes) override {
    return std::make_shared<Storage>(reinterpret_cast<void*>(uintptr_t{1} << 40), bytes, nullptr);
  }
  void load(const Tensor&, const void*) override {}
  void store(void*, const Tensor&) override {}
  std::shared_ptr<Fence> mark(Lane) override { return std::make_shared<NoFence>(); }
  void follow(Lane, Fence&) override {}
};

class CountedReplay final : public Replay {
 public:
  explicit CountedReplay(std::function<void()> run, std::shared_ptr<void> held)
      : run_(std::move(run)), held_(std::move(held)) {}
  void run() override {
    if (run_) run_();
  }

 private:
  std::function<void()> run_;  // on a CPU, where nothing is recorded
  std::shared_ptr<void> held_;
};

}  // namespace

CountingBackend::CountingBackend(const Backend& device)
    : device_(device),
      usage_(std::make_shared<Usage>()),
      tensors_(std::make_shared<Pool>(usage_, Pool::Keeps::Tensors)),
      pool_(tensors_),
      transfers_(std::make_unique<NoTransfers>()) {}

CountingBackend::~CountingBackend() = default;

int64_t CountingBackend::recorded_bytes() const {
  const std::shared_ptr<RecordingPools> pools = recordings_.lock();
  return pools ? pools->main->slab_bytes() + pools->side->slab_bytes() : 0;
}

int64_t CountingBackend::memory_peak_bytes() const {
  const std::lock_guard lock(usage_->mutex);
  return usage_->peak_bytes;
}

void CountingBackend::reset_memory_peak() {
  const std::lock_guard lock(usage_->mutex);
  usage_->peak_bytes = usage_->held_bytes;
}

std::unique_ptr<Replay> CountingBackend::record(std::function<void()> step) {
  if (device() == DeviceType::Cpu) return std::make_unique<CountedReplay>(std::move(step), nullptr);
  std::shared_ptr<RecordingPools> pools = recordings_.lock();
  if (!pools) {
    pools = std::make_shared<RecordingPools>(
        RecordingPools{std::make_shared<Pool>(usage_, Pool::Keeps::Slabs),
                       std::make_shared<Pool>(usage_, Pool::Keeps::Slabs)});
    recordings_ = pools;
  }
  pool_ = pools->main;
  step();
  pool_ = tensors_;
  return std::make_unique<CountedReplay>(nullptr, std::move(pools));
}

void CountingBackend::overlap(const std::function<void()>& side,
                              const std::function<void()>& main) {
  const std::shared_ptr<RecordingPools> pools = recordings_.lock();
  const std::shared_ptr<Pool> outer = pool_;
  if (pools && outer == pools->main) pool_ = pools->side;
  side();
  pool_ = outer;
  main();
}

Tensor CountingBackend::do_empty(Shape shape, DType dtype) {
  const int64_t bytes = numel_of(shape) * size_bytes(dtype);
  return Tensor(pool_->allocate(bytes, block_bytes(bytes)), 0, std::move(shape), dtype, device());
}

void CountingBackend::do_download(void* dst, const Tensor& src) {
  std::memset(dst, 0, static_cast<size_t>(src.bytes()));
}

}  // namespace bbb::engine
