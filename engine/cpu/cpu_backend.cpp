// Construction, memory and plain data movement of the CPU backend.
#include "engine/cpu/cpu_backend.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "engine/bf16.h"
#include "engine/cpu/blas.h"

namespace bbb::engine {
namespace {

class DirectReplay final : public Replay {
 public:
  explicit DirectReplay(std::function<void()> step) : step_(std::move(step)) {}
  void run() override { step_(); }

 private:
  std::function<void()> step_;
};

class ReachedFence final : public Fence {
 public:
  void wait() override {}
};

// Copies at submission: lanes have nothing to wait for.
class DirectTransfers final : public Transfers {
 public:
  std::shared_ptr<Storage> host_buffer(int64_t bytes) override {
    constexpr int64_t kPage = 4096;
    const int64_t size = std::max<int64_t>(1, (bytes + kPage - 1) / kPage) * kPage;
    void* const block = size <= HostMemory::available_bytes()
                            ? std::aligned_alloc(kPage, static_cast<size_t>(size))
                            : nullptr;
    BBB_CHECK(block != nullptr, "out of host memory: ", bytes, " bytes requested, ",
              HostMemory::available_bytes(), " available");
    return std::make_shared<Storage>(block, bytes, [block] { std::free(block); });
  }
  void load(const Tensor& dst, const void* src) override {
    std::memcpy(dst.raw(), src, static_cast<size_t>(dst.bytes()));
  }
  void store(void* dst, const Tensor& src) override {
    std::memcpy(dst, src.raw(), static_cast<size_t>(src.bytes()));
  }
  std::shared_ptr<Fence> mark(Lane) override { return std::make_shared<ReachedFence>(); }
  void follow(Lane, Fence&) override {}
};

// Conversion to and from double, which holds every F32 and bf16 exactly.
double widen(double x) { return x; }
double widen(float x) { return x; }
double widen(uint16_t x) { return from_bf16(x); }
void narrow(double x, double& out) { out = x; }
void narrow(double x, float& out) { out = static_cast<float>(x); }
void narrow(double x, uint16_t& out) { out = to_bf16(x); }

template <typename Fn>
void with_real(const Tensor& t, const Fn& fn) {
  switch (t.dtype()) {
    case DType::F64:
      return fn(t.data<double>());
    case DType::F32:
      return fn(t.data<float>());
    case DType::BF16:
      return fn(t.data<uint16_t>());
    default:
      BBB_ASSERT(!"a real dtype");
  }
}

}  // namespace

template <typename T>
CpuBackend<T>::CpuBackend(int threads)
    : pool_(threads),
      memory_(std::make_shared<HostMemory>()),
      transfers_(std::make_unique<DirectTransfers>()) {
  openblas_set_num_threads(1);
}

template <typename T>
std::string CpuBackend<T>::device_name() const {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);)
    if (line.rfind("model name", 0) == 0 && line.find(": ") != std::string::npos)
      return line.substr(line.find(": ") + 2);
  return "CPU";
}

template <typename T>
int64_t CpuBackend<T>::memory_total_bytes() const {
  return HostMemory::total_bytes();
}

template <typename T>
int64_t CpuBackend<T>::memory_available_bytes() const {
  return HostMemory::available_bytes() + memory_->cached_bytes();
}

template <typename T>
int64_t CpuBackend<T>::memory_peak_bytes() const {
  return memory_->peak_bytes();
}

template <typename T>
void CpuBackend<T>::reset_memory_peak() {
  memory_->reset_peak();
}

template <typename T>
std::unique_ptr<Replay> CpuBackend<T>::record(std::function<void()> step) {
  return std::make_unique<DirectReplay>(std::move(step));
}

template <typename T>
Tensor CpuBackend<T>::do_empty(Shape shape, DType dtype) {
  const int64_t numel = numel_of(shape), size = size_bytes(dtype);
  return Tensor(memory_->allocate(numel * size), 0, std::move(shape), dtype, DeviceType::Cpu);
}

template <typename T>
void CpuBackend<T>::do_upload(const Tensor& dst, const void* src) {
  if (dst.bytes() > 0) std::memcpy(dst.raw(), src, static_cast<size_t>(dst.bytes()));
}

template <typename T>
void CpuBackend<T>::do_download(void* dst, const Tensor& src) {
  if (src.bytes() > 0) std::memcpy(dst, src.raw(), static_cast<size_t>(src.bytes()));
}

template <typename T>
void CpuBackend<T>::do_copy(const Tensor& dst, const Tensor& src) {
  auto* to = static_cast<uint8_t*>(dst.raw());
  const auto* from = static_cast<const uint8_t*>(src.raw());
  if (to == from) return;
  parallel_for(dst.bytes(), kElementGrain * 16, [&](int64_t begin, int64_t end) {
    std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin));
  });
}

template <typename T>
void CpuBackend<T>::do_cast(const Tensor& dst, const Tensor& src) {
  if (dst.dtype() == src.dtype()) return do_copy(dst, src);
  with_real(dst, [&](auto* out) {
    with_real(src, [&](const auto* in) {
      parallel_for(dst.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) narrow(widen(in[i]), out[i]);
      });
    });
  });
}

template <typename T>
void CpuBackend<T>::do_zero(const Tensor& dst) {
  auto* to = static_cast<uint8_t*>(dst.raw());
  parallel_for(dst.bytes(), kElementGrain * 16, [&](int64_t begin, int64_t end) {
    std::memset(to + begin, 0, static_cast<size_t>(end - begin));
  });
}

template class CpuBackend<float>;
template class CpuBackend<double>;

std::unique_ptr<Backend> make_cpu_backend(int threads) {
  return std::make_unique<CpuBackend<float>>(threads);
}

std::unique_ptr<Backend> make_cpu_f64_backend(int threads) {
  return std::make_unique<CpuBackend<double>>(threads);
}

}  // namespace bbb::engine
