#include "engine/counting_backend.h"

#include <cstring>
#include <utility>

namespace bbb::engine {
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

// Slabs have addresses without memory behind them.
std::shared_ptr<DeviceMemory> counted_memory() {
  auto memory = std::make_shared<DeviceMemory>();
  memory->allocate = [next = uintptr_t{1} << 40](int64_t bytes) mutable {
    return reinterpret_cast<void*>(std::exchange(next, next + static_cast<uintptr_t>(bytes)));
  };
  memory->release = [](void*) {};
  memory->room = [] { return std::string("counted only"); };
  return memory;
}

}  // namespace

CountingBackend::CountingBackend(const Backend& device)
    : device_(device),
      tensors_(std::make_shared<MemoryPool>(counted_memory(), Reclaim::OnPressure)),
      pool_(tensors_),
      transfers_(std::make_unique<NoTransfers>()) {}

int64_t CountingBackend::recorded_bytes() const {
  const std::shared_ptr<RecordingPools> pools = recordings_.lock();
  return pools ? pools->main->reserved_bytes() + pools->side->reserved_bytes() : 0;
}

int64_t CountingBackend::memory_peak_bytes() const { return pool_->peak_bytes(); }

void CountingBackend::reset_memory_peak() { pool_->reset_peak(); }

std::unique_ptr<Replay> CountingBackend::record(std::function<void()> step) {
  if (device() == DeviceType::Cpu) return std::make_unique<CountedReplay>(std::move(step), nullptr);
  std::shared_ptr<RecordingPools> pools = recordings_.lock();
  if (!pools) {
    pools = std::make_shared<RecordingPools>(tensors_->device());
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
  const std::shared_ptr<MemoryPool> outer = pool_;
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
