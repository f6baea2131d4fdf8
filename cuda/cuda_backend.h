// CudaBackend: one GPU, bf16 activations, FP32 everywhere that accumulates. Work runs on one
// stream; in a recorded step, forked work runs on a second one.
//
// Memory comes from a caching pool (cuda/memory.h): later allocations in the same stream order
// reuse a freed block. While a step is recorded, each stream has its own pool, so that addresses
// stay valid.
#pragma once

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <memory>

#include "cuda/handle.h"
#include "engine/backend.h"
#include "quant/launch.h"

#define BBB_CUBLAS(call)                                                                    \
  ::bbb::quant::check_status((call), CUBLAS_STATUS_SUCCESS, cublasLtGetStatusString, #call, \
                             __FILE__, __LINE__)

namespace bbb::cuda {

using bf16 = __nv_bfloat16;
using engine::AdamWSpec;
using engine::AttentionSpec;
using engine::DeviceType;
using engine::DType;
using engine::PackedWeight;
using engine::ParameterTable;
using engine::QuantizedWeights;
using engine::Replay;
using engine::Rotation;
using engine::Rounding;
using engine::Rows;
using engine::Schedule;
using engine::Shape;
using engine::Tensor;
using engine::WeightGrid;
using engine::Write;
using quant::LaunchShape;
#ifdef __CUDACC__
using quant::launch;
#endif

bool is_capturing(cudaStream_t stream);  // a step is being recorded

// Positions start .. start + t - 1 lie outside of a key-value cache of `capacity`. t 0: no fault.
struct CacheFault {
  int start, t, capacity;
};

class MemoryPool;       // cuda/memory.h
struct RecordingPools;  // cuda/memory.h
class GemmPlanner;      // cuda/gemm.h

class CudaBackend final : public engine::Backend {
 public:
  explicit CudaBackend(int device);
  ~CudaBackend() override;

  DeviceType device() const override { return DeviceType::Cuda; }
  DType act() const override { return DType::BF16; }
  DType real() const override { return DType::F32; }
  std::string device_name() const override;
  int64_t memory_total_bytes() const override;
  int64_t memory_available_bytes() const override;
  int64_t memory_peak_bytes() const override;
  void reset_memory_peak() override;
  void synchronize() override;
  engine::Transfers& transfers() override { return *transfers_; }
  std::unique_ptr<Replay> record(std::function<void()> step) override;
  void overlap(const std::function<void()>& side, const std::function<void()>& main) override;
  void check_head_size(int64_t d) const override;
  int64_t block_bytes(int64_t bytes) const override;
  int64_t scratch_bytes(engine::ScratchOp op, const Shape& shape) const override;
  int64_t attention_backward_scratch_bytes(const Shape& q, const Shape& k,
                                           const AttentionSpec& spec) const override;
  std::string gemm_library() const override;
  void tune_gemms(std::optional<engine::GemmTuning> tuning) override;

  cudaStream_t stream() const { return stream_; }
  const cudaDeviceProp& properties() const { return properties_; }
  // Whether the kernels for sm_90a are built in and run on this GPU. BBB_GENERIC_KERNELS in the
  // environment turns them off, so that one GPU can test both.
  bool has_warpgroup_products() const;

 private:
  // Throws if a kernel found a fault since the last call. The stream's work must be done.
  void check_faults();

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
  cudaDeviceProp properties_{};
  StreamHandle own_stream_;
  cudaStream_t stream_ = nullptr;             // own_stream_, or side_stream_ within forked work
  StreamHandle side_stream_;                  // of forked work
  Handle<char*, cudaFree> side_workspace_;    // of the GEMMs on side_stream_
  std::shared_ptr<MemoryPool> pool_;          // the current one
  std::weak_ptr<RecordingPools> recordings_;  // contain pool_ while recording; held by the Replays
  std::unique_ptr<GemmPlanner> gemm_;
  std::unique_ptr<engine::Transfers> transfers_;
  Handle<CacheFault*, cudaFreeHost> cache_fault_;  // page-locked: kernels write it
};

// Scratch of ops by their shapes (engine::ScratchOp), each beside its kernels.
int64_t rms_norm_backward_scratch_bytes(int64_t rows, int64_t d);
int64_t input_scale_gradient_scratch_bytes(int64_t rows, int64_t columns);
int64_t attention_cached_scratch_bytes(int64_t batch, int64_t heads, int64_t d, int64_t t_max);

inline bf16* bf16_of(const Tensor& t) { return static_cast<bf16*>(t.raw()); }
// Calls fn with the data pointer of a tensor whose dtype is act or real.
template <typename Fn>
void with_elements(const Tensor& t, const Fn& fn) {
  if (t.dtype() == DType::BF16)
    fn(bf16_of(t));
  else
    fn(t.data<float>());
}

}  // namespace bbb::cuda
