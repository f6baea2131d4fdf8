// CpuBackend: the reference, and what bbb runs on without a GPU. Plain loops over a pool of
// threads; matrix products through OpenBLAS.
//
//     CpuBackend<float>   act F32, real F32
//     CpuBackend<double>  act F64, real F64: gradient checks
//
// OpenBLAS runs single-threaded: a product is cut into strips of its output, and each thread of the
// pool calls BLAS on a strip. Otherwise the threads of OpenBLAS and of the pool would compete for
// the cores.
//
// There is one file per op family. It ends with the explicit instantiations of its members
// (BBB_CPU_INSTANTIATE).
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "engine/backend.h"
#include "engine/cpu/memory.h"
#include "engine/cpu/thread_pool.h"

namespace bbb::engine {

template <typename T>
class CpuBackend final : public Backend {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

 public:
  static constexpr DType kDType = std::is_same_v<T, float> ? DType::F32 : DType::F64;

  explicit CpuBackend(int threads);  // 0: all cores

  DeviceType device() const override { return DeviceType::Cpu; }
  DType act() const override { return kDType; }
  DType real() const override { return kDType; }
  std::string device_name() const override;
  int64_t memory_total_bytes() const override;
  int64_t memory_available_bytes() const override;
  int64_t memory_peak_bytes() const override;
  void reset_memory_peak() override;
  void synchronize() override {}
  Transfers& transfers() override { return *transfers_; }
  std::unique_ptr<Replay> record(std::function<void()> step) override;
  void overlap(const std::function<void()>& side, const std::function<void()>& main) override {
    side();
    main();
  }
  void check_head_size(int64_t) const override {}
  int64_t block_bytes(int64_t bytes) const override { return HostMemory::block_bytes(bytes); }
  int64_t scratch_bytes(ScratchOp, const Shape&) const override { return 0; }
  int64_t attention_backward_scratch_bytes(const Shape&, const Shape&,
                                           const AttentionSpec&) const override {
    return 0;
  }
  int64_t repacked_bytes(const quant::LinearFormat& format) const override;
  int64_t max_packed_rows(const quant::LinearFormat&) const override { return kMaxPackedRows; }
  std::string gemm_library() const override { return ""; }
  void tune_gemms(std::optional<GemmTuning>) override {}  // OpenBLAS leaves nothing to choose

 private:
  // Calls fn(begin, end) on ranges of `grain` of [0, n), spread over the threads.
  template <typename Fn>
  void parallel_for(int64_t n, int64_t grain, const Fn& fn) {
    if (n <= grain) {
      if (n > 0) fn(int64_t{0}, n);
    } else {
      pool_.parallel_for(n, grain, fn);
    }
  }

  // Sum of part(begin, end) over ranges of kSumGrain, added in their order.
  template <typename Fn>
  double ordered_sum(int64_t n, const Fn& part) {
    std::vector<double> parts(static_cast<size_t>((n + kSumGrain - 1) / kSumGrain));
    parallel_for(n, kSumGrain, [&](int64_t begin, int64_t end) {
      parts[static_cast<size_t>(begin / kSumGrain)] = part(begin, end);
    });
    double total = 0;
    for (const double p : parts) total += p;
    return total;
  }

  // Activations: rows of T, or a quantized operand's.
  template <typename Activations>
  void packed_products(const PackedProducts& products, const Activations& x, int64_t m);
  void operand_products(const PackedProducts& products, const T* x, int64_t rows,
                        const OperandSpec* spec);
  // attention_cached of one query a sequence.
  void attend_step(const Tensor& o, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                   const int32_t* start, const AttentionSpec& spec, KvFormat format);
  // The row indices of a batch of `count`, all checked to be rows of src. `op` is for errors.
  static const int32_t* order_of(const char* op, const Rows& batch, int64_t count);

  int threads() const { return pool_.threads(); }
  static T* data(const Tensor& t) { return t.data<T>(); }

  Tensor do_empty(Shape shape, DType dtype) override;
  void do_download(void* dst, const Tensor& src) override;
  BBB_BACKEND_OPS(BBB_OVERRIDE_OP)

  // Packed weights: panels and integer products, or exact loops (packed.cpp).
  static constexpr bool kPanels = std::is_same_v<T, float>;
  static constexpr int64_t kSumGrain = 32768;

  ThreadPool pool_;
  std::shared_ptr<HostMemory> memory_;  // shared with the storage of every tensor
  std::unique_ptr<Transfers> transfers_;
};

// Elements of one range of an elementwise loop: some ten microseconds of work.
inline constexpr int64_t kElementGrain = 16384;
// Rows of K elements of such a range.
inline int64_t row_grain(int64_t k) {
  return std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, k));
}

}  // namespace bbb::engine

// Instantiates one op for both backends.
#define BBB_CPU_INSTANTIATE(name)                            \
  template void CpuBackend<float>::do_##name(BBB_OP_##name); \
  template void CpuBackend<double>::do_##name(BBB_OP_##name)
