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
#include "engine/memory_pool.h"
#include "quant/launch.h"

#define BBB_CUBLAS(call)                                                                    \
  ::bbb::quant::check_status((call), CUBLAS_STATUS_SUCCESS, cublasLtGetStatusString, #call, \
                             __FILE__, __LINE__)

namespace bbb::cuda {

using bf16 = __nv_bfloat16;
using engine::AdamWSpec;
using engine::Arg;
using engine::AttentionSpec;
using engine::DeviceType;
using engine::DType;
using engine::LcWeight;
using engine::MemoryPool;
using engine::OperandRows;
using engine::OperandSpec;
using engine::PackedProduct;
using engine::PackedProducts;
using engine::PackedWeight;
using engine::ParameterTable;
using engine::QuantizedWeights;
using engine::RecordingPools;
using engine::Replay;
using engine::Rotation;
using engine::Rounding;
using engine::Rows;
using engine::SampleRows;
using engine::SampleSpec;
using engine::Schedule;
using engine::Shape;
using engine::Tensor;
using engine::WeightGrid;
using engine::Write;
using quant::KvFormat;
using quant::LaunchShape;
#ifdef __CUDACC__
using quant::launch;
#endif

std::shared_ptr<engine::DeviceMemory> device_memory();  // of the current GPU
bool is_capturing(cudaStream_t stream);                 // a step is being recorded

// Positions start .. start + t - 1 lie outside of a key-value cache of `capacity`. t 0: no fault.
struct CacheFault {
  int start, t, capacity;
};

// A logit from which no token can be chosen.
struct LogitFault {
  bool found;
  int token;
  float logit;
};

class GemmPlanner;  // cuda/gemm.h

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
  int64_t repacked_bytes(const quant::LinearFormat& format) const override;
  int64_t max_packed_rows(const quant::LinearFormat& format) const override;
  std::string gemm_library() const override;
  void tune_gemms(std::optional<engine::GemmTuning> tuning) override;

  cudaStream_t stream() const { return stream_; }
  const cudaDeviceProp& properties() const { return properties_; }
  // Whether the kernels for sm_90a are built in and run on this GPU. BBB_GENERIC_KERNELS in the
  // environment turns them off, so that one GPU can test both.
  bool has_warpgroup_products() const;
  // Whether the small kernels of a step of so many rows start early (cuda/early_start.h).
  bool starts_early(int64_t rows) const {
    return has_warpgroup_products() && rows <= kMaxPackedRows;
  }

 private:
  // Throws if a kernel found a fault since the last call. The stream's work must be done.
  void check_faults();
  // Whether packed weights of this format are in tiles (cuda/packed.cu).
  bool takes_tiles(const quant::LinearFormat& format) const;
  // Whether they are as in the file, with what products of many rows need beside it.
  bool takes_slice_pairs(const quant::LinearFormat& format) const;
  bool all_in_tiles(const PackedProducts& products) const;
  bool makes_rows(const PackedProducts& products, const OperandSpec* spec, int64_t m) const;
  template <typename Make>
  void multiply_operand(const PackedProducts& products, int64_t m, const OperandSpec& spec,
                        const Make& make);
  template <typename Tiled, typename Other>
  void packed_products(const PackedProducts& products, const Tiled& tiled,
                       const Other& other) const;

  Tensor do_empty(Shape shape, DType dtype) override;
  void do_download(void* dst, const Tensor& src) override;
  BBB_BACKEND_OPS(BBB_OVERRIDE_OP)
  cudaDeviceProp properties_{};
  StreamHandle own_stream_;
  cudaStream_t stream_ = nullptr;             // own_stream_, or side_stream_ within forked work
  StreamHandle side_stream_;                  // of forked work
  Handle<char*, cudaFree> side_workspace_;    // of the GEMMs on side_stream_
  std::shared_ptr<MemoryPool> pool_;          // the current one
  std::weak_ptr<RecordingPools> recordings_;  // contain pool_ while recording; held by the Replays
  std::unique_ptr<GemmPlanner> gemm_;
  std::unique_ptr<engine::Transfers> transfers_;
  // Page-locked: kernels write them.
  Handle<CacheFault*, cudaFreeHost> cache_fault_;
  Handle<LogitFault*, cudaFreeHost> logit_fault_;
};

// Scratch of ops by their shapes (engine::ScratchOp), each defined with its kernels.
int64_t rms_norm_backward_scratch_bytes(int64_t rows, int64_t d);
int64_t input_scale_gradient_scratch_bytes(int64_t rows, int64_t columns);
int64_t lc_weight_backward_scratch_bytes(int64_t n, int64_t k);
int64_t lora_weight_backward_scratch_bytes(int64_t rows, int64_t k, int64_t rank);
int64_t channel_moments_scratch_bytes(int64_t rows, int64_t k);
int64_t attention_cached_scratch_bytes(const Shape& shape, int sms);
int64_t sample_scratch_bytes(int64_t rows, int64_t vocab);
int64_t embed_backward_scratch_bytes(int64_t rows, int64_t vocabulary);

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
