// CudaTransfers: a copy stream for each direction, and page-locked host memory.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/handle.h"
#include "engine/transfers.h"

namespace bbb::cuda {

class CudaTransfers final : public engine::Transfers {
 public:
  explicit CudaTransfers(cudaStream_t compute);
  ~CudaTransfers() override;
  CudaTransfers(const CudaTransfers&) = delete;
  CudaTransfers& operator=(const CudaTransfers&) = delete;

  std::shared_ptr<engine::Storage> host_buffer(int64_t bytes) override;
  void load(const engine::Tensor& dst, const void* src) override;
  void store(void* dst, const engine::Tensor& src) override;
  std::shared_ptr<engine::Fence> mark(engine::Lane lane) override;
  void follow(engine::Lane lane, engine::Fence& fence) override;

 private:
  cudaStream_t stream_of(engine::Lane lane) const;

  cudaStream_t compute_;  // the backend's
  StreamHandle load_, store_;
};

}  // namespace bbb::cuda
