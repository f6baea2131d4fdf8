// CountingBackend: computes nothing and counts the memory that tensors take on another backend.
//
// A step that runs here allocates as on that device: blocks have the same sizes, ops take the same
// scratch, and on a GPU recordings keep the memory that they allocated. So memory is planned by
// running the real step. Tensors have addresses without memory behind them. Ops touch no memory,
// host values are not read, and a download gives zeros.
#pragma once

#include <memory>

#include "engine/backend.h"
#include "engine/memory_pool.h"

namespace bbb::engine {

// `device` must outlive the CountingBackend.
class CountingBackend final : public Backend {
 public:
  explicit CountingBackend(const Backend& device);

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
  int64_t repacked_bytes(const quant::LinearFormat& format) const override {
    return device_.repacked_bytes(format);
  }
  int64_t max_packed_rows(const quant::LinearFormat& format) const override {
    return device_.max_packed_rows(format);
  }
  void synchronize() override {}
  Transfers& transfers() override { return *transfers_; }
  std::unique_ptr<Replay> record(std::function<void()> step) override;
  void overlap(const std::function<void()>& side, const std::function<void()>& main) override;
  std::string gemm_library() const override { return device_.gemm_library(); }
  void tune_gemms(std::optional<GemmTuning>) override {}
  void check_head_size(int64_t d) const override { device_.check_head_size(d); }

 private:
  std::unique_ptr<LayerDecoder> do_layer_decoder(const DecodeStack&) override { return nullptr; }
  Tensor do_empty(Shape shape, DType dtype) override;
  void do_download(void* dst, const Tensor& src) override;
#define BBB_NO_OP(name) \
  void do_##name(BBB_OP_##name) override {}
  BBB_BACKEND_OPS(BBB_NO_OP)
#undef BBB_NO_OP

  const Backend& device_;
  std::shared_ptr<MemoryPool> tensors_;
  std::shared_ptr<MemoryPool> pool_;  // the pool that serves do_empty() now
  std::weak_ptr<RecordingPools> recordings_;
  std::unique_ptr<Transfers> transfers_;
};

}  // namespace bbb::engine
