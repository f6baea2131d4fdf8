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

  // The row indices of a batch of `count`, all checked to be rows of src. `op` is for errors.
  static const int32_t* order_of(const char* op, const Rows& batch, int64_t count);

  int threads() const { return pool_.threads(); }
  static T* data(const Tensor& t) { return t.data<T>(); }

  Tensor do_empty(Shape shape, DType dtype) override;
  void do_upload(const Tensor& dst, const void* src) override;
  void do_download(void* dst, const Tensor& src) override;
  void do_copy(const Tensor& dst, const Tensor& src) override;
  void do_cast(const Tensor& dst, const Tensor& src) override;
  void do_zero(const Tensor& dst) override;
  void do_embed(const Tensor& out, const Tensor& ids, const Tensor& table) override;
  void do_gather_rows(const Tensor& out, const Rows& batch) override;
  void do_advance(const Tensor& cursor) override;
  void do_log_control(const Tensor& log, const Tensor& control, const Tensor& cursor) override;
  void do_gemm_nt(const Tensor& y, const Tensor& x, const Tensor& w, const Tensor& alpha,
                  const Tensor& addend) override;
  void do_gemm_nn(const Tensor& dx, const Tensor& dy, const Tensor& w, const Tensor& alpha,
                  Write mode) override;
  void do_gemm_tn(const Tensor& dw, const Tensor& dy, const Tensor& x, Write mode) override;
  void do_rms_norm(const Tensor& y, const Tensor& inv_rms, const Tensor& x, const Tensor& w,
                   double eps) override;
  void do_rms_norm_backward(const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x,
                            const Tensor& inv_rms, const Tensor& w, Write dx_mode, Write dw_mode,
                            const Tensor& scratch) override;
  void do_input_scale_gradient(const Tensor& ds, const Tensor& s, const Tensor& w,
                               const Tensor& alpha, const Tensor& dw, Write mode,
                               const Tensor& scratch) override;
  void do_swiglu(const Tensor& h, const Tensor& gate, const Tensor& up) override;
  void do_swiglu_backward(const Tensor& dgate, const Tensor& dup, const Tensor& dh,
                          const Tensor& gate, const Tensor& up) override;
  void do_rope(const Tensor& x, const Tensor& inv_freq, const Tensor& start,
               Rotation direction) override;
  void do_add(const Tensor& out, const Tensor& a, const Tensor& b) override;
  void do_attention(const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k,
                    const Tensor& v, const AttentionSpec& spec, const Tensor& scratch) override;
  void do_attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                             const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& o, const Tensor& lse, const Tensor& inv_freq,
                             const AttentionSpec& spec, const Tensor& scratch) override;
  void do_append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                    const Tensor& start) override;
  void do_attention_cached(const Tensor& o, const Tensor& q, const Tensor& k_cache,
                           const Tensor& v_cache, const Tensor& start, const AttentionSpec& spec,
                           const Tensor& scratch) override;
  void do_mse(const Tensor& loss, const Tensor& dx, const Tensor& x, const Rows& y,
              const Tensor& scratch) override;
  void do_cross_entropy(const Tensor& loss, const Tensor& dlogits, const Tensor& logits,
                        const Tensor& targets, double scale) override;
  void do_kl_divergence(const Tensor& loss, const Tensor& dlogits, const Tensor& logits,
                        const Tensor& teacher, const Tensor& targets, double scale) override;
  void do_cross_entropy_chunk(const Tensor& loss, const Tensor& state, const Tensor& logits,
                              const Tensor& targets, int64_t first_word, Write mode) override;
  void do_kl_divergence_chunk(const Tensor& loss, const Tensor& state, const Tensor& logits,
                              const Tensor& teacher, const Tensor& targets, Write mode) override;
  void do_cross_entropy_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                       const Tensor& state, const Tensor& targets,
                                       int64_t first_word, double scale) override;
  void do_kl_divergence_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                       const Tensor& teacher, const Tensor& state,
                                       const Tensor& targets, double scale) override;
  void do_sum(const Tensor& out, const Tensor& x, double scale, Write mode,
              const Tensor& scratch) override;
  void do_max_group_range(const QuantizedWeights& q, const Tensor& w) override;
  void do_fake_quant(const QuantizedWeights& q, const Tensor& w) override;
  void do_quantize_codes(const Tensor& codes, const Tensor& w, const Tensor& e, const Tensor& z,
                         const Tensor& s, const WeightGrid& spec) override;
  void do_scale_codes(const Tensor& wq, const Tensor& e, const Tensor& s, const Tensor& codes,
                      const Tensor& z, const Tensor& sigma, const WeightGrid& spec) override;
  void do_scale_codes_backward(const Tensor& dsigma, const Tensor& dw, const Tensor& codes,
                               const Tensor& z, const WeightGrid& spec, Write mode) override;
  void do_unpack(const Tensor& wq, const PackedWeight& w) override;
  void do_packed_gemv(const Tensor& y, const Tensor& x, const PackedWeight& w,
                      const Tensor& addend) override;
  void do_step_control(const Tensor& control, const Tensor& loss, const Tensor& g,
                       const Tensor& clipped, const Schedule& schedule,
                       const Tensor& scratch) override;
  void do_adamw(const Tensor& w, const Tensor& m, const Tensor& v, const Tensor& g,
                const Tensor& control, const ParameterTable& table, const QuantizedWeights& q,
                const AdamWSpec& spec) override;

  static constexpr int64_t kSumGrain = 32768;

  ThreadPool pool_;
  std::shared_ptr<HostMemory> memory_;  // shared with the storage of every tensor
  std::unique_ptr<Transfers> transfers_;
};

// Elements of one range of an elementwise loop: some ten microseconds of work.
inline constexpr int64_t kElementGrain = 16384;

}  // namespace bbb::engine

// Instantiates a member that returns void for both types; the arguments are its parameter types.
#define BBB_CPU_INSTANTIATE(member, ...)                \
  template void CpuBackend<float>::member(__VA_ARGS__); \
  template void CpuBackend<double>::member(__VA_ARGS__)
