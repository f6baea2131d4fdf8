// CountingBackend: computes nothing and counts the memory that tensors take on another backend.
//
// A step that runs here allocates as on that device: blocks have the same sizes, ops take the same
// scratch, and on a GPU recordings keep the memory that they allocated. So memory is planned by
// running the real step. Tensors have addresses without memory behind them. Ops touch no memory,
// host values are not read, and a download gives zeros.
#pragma once

#include <memory>

#include "engine/backend.h"

namespace bbb::engine {

// `device` must outlive the CountingBackend.
class CountingBackend final : public Backend {
 public:
  explicit CountingBackend(const Backend& device);
  ~CountingBackend() override;

  // Bytes that all living recordings hold; 0 on a CPU, which records nothing.
  int64_t recorded_bytes() const;

  DeviceType device() const override { return device_.device(); }
  DType act() const override { return device_.act(); }
  DType real() const override { return device_.real(); }
  std::string device_name() const override { return device_.device_name(); }
  int64_t memory_total_bytes() const override { return device_.memory_total_bytes(); }
  int64_t memory_available_bytes() const override { return device_.memory_available_bytes(); }
  int64_t memory_peak_bytes() const override;
  void reset_memory_peak() override;
  bool computes() const override { return false; }
  int64_t block_bytes(int64_t bytes) const override { return device_.block_bytes(bytes); }
  int64_t scratch_bytes(ScratchOp op, const Shape& shape) const override {
    return device_.scratch_bytes(op, shape);
  }
  int64_t attention_backward_scratch_bytes(const Shape& q, const Shape& k,
                                           const AttentionSpec& spec) const override {
    return device_.attention_backward_scratch_bytes(q, k, spec);
  }
  void synchronize() override {}
  Transfers& transfers() override { return *transfers_; }
  std::unique_ptr<Replay> record(std::function<void()> step) override;
  void overlap(const std::function<void()>& side, const std::function<void()>& main) override;
  std::string gemm_library() const override { return device_.gemm_library(); }
  void tune_gemms(std::optional<GemmTuning>) override {}
  void check_head_size(int64_t d) const override { device_.check_head_size(d); }

  struct Usage;           // bytes held, and their peak
  class Pool;             // tensors outside recordings, or one stream of the recordings
  struct RecordingPools;  // the two streams of the recordings

 private:
  Tensor do_empty(Shape shape, DType dtype) override;
  void do_download(void* dst, const Tensor& src) override;
  void do_upload(const Tensor&, const void*) override {}
  void do_copy(const Tensor&, const Tensor&) override {}
  void do_cast(const Tensor&, const Tensor&) override {}
  void do_zero(const Tensor&) override {}
  void do_embed(const Tensor&, const Tensor&, const Tensor&) override {}
  void do_gather_rows(const Tensor&, const Rows&) override {}
  void do_advance(const Tensor&) override {}
  void do_log_control(const Tensor&, const Tensor&, const Tensor&) override {}
  void do_gemm_nt(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                  const Tensor&) override {}
  void do_gemm_nn(const Tensor&, const Tensor&, const Tensor&, const Tensor&, Write) override {}
  void do_gemm_tn(const Tensor&, const Tensor&, const Tensor&, Write) override {}
  void do_rms_norm(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double) override {}
  void do_rms_norm_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const Tensor&, const Tensor&, Write, Write, const Tensor&) override {}
  void do_input_scale_gradient(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                               const Tensor&, Write, const Tensor&) override {}
  void do_swiglu(const Tensor&, const Tensor&, const Tensor&) override {}
  void do_swiglu_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor&) override {}
  void do_rope(const Tensor&, const Tensor&, const Tensor&, Rotation) override {}
  void do_add(const Tensor&, const Tensor&, const Tensor&) override {}
  void do_attention(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                    const AttentionSpec&, const Tensor&) override {}
  void do_attention_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                             const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                             const Tensor&, const Tensor&, const AttentionSpec&,
                             const Tensor&) override {}
  void do_append_kv(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                    const Tensor&) override {}
  void do_attention_cached(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                           const Tensor&, const AttentionSpec&, const Tensor&) override {}
  void do_mse(const Tensor&, const Tensor&, const Tensor&, const Rows&, const Tensor&) override {}
  void do_cross_entropy(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        double) override {}
  void do_kl_divergence(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        double) override {}
  void do_cross_entropy_chunk(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                              Write) override {}
  void do_kl_divergence_chunk(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                              const Tensor&, Write) override {}
  void do_cross_entropy_chunk_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       int64_t, double) override {}
  void do_kl_divergence_chunk_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       const Tensor&, double) override {}
  void do_sum(const Tensor&, const Tensor&, double, Write, const Tensor&) override {}
  void do_max_group_range(const QuantizedWeights&, const Tensor&) override {}
  void do_fake_quant(const QuantizedWeights&, const Tensor&) override {}
  void do_quantize_codes(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                         const WeightGrid&) override {}
  void do_scale_codes(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                      const Tensor&, const WeightGrid&) override {}
  void do_scale_codes_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                               const WeightGrid&, Write) override {}
  void do_unpack(const Tensor&, const PackedWeight&) override {}
  void do_packed_gemv(const Tensor&, const Tensor&, const PackedWeight&, const Tensor&) override {}
  void do_step_control(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Schedule&,
                       const Tensor&) override {}
  void do_adamw(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const ParameterTable&, const QuantizedWeights&, const AdamWSpec&) override {}

  const Backend& device_;
  std::shared_ptr<Usage> usage_;
  std::shared_ptr<Pool> tensors_;
  std::shared_ptr<Pool> pool_;  // the pool that serves do_empty() now
  std::weak_ptr<RecordingPools> recordings_;
  std::unique_ptr<Transfers> transfers_;
};

}  // namespace bbb::engine
