// Lanes are CUDA streams, fences are events; see transfers.h.
#ifdef BBB_HAS_CUDA
#include "cuda/transfers.h"

#include "cuda/host_waits.h"
#include "quant/launch.h"

namespace bbb::cuda {
namespace {

class EventFence final : public engine::Fence {
 public:
  explicit EventFence(cudaStream_t stream)
      : event_(make_event(cudaEventDisableTiming | cudaEventBlockingSync)) {
    BBB_CUDA(cudaEventRecord(event(), stream));
  }

  void wait() override {
    const HostWait wait;
    BBB_CUDA(cudaEventSynchronize(event()));
  }
  cudaEvent_t event() const { return event_.get(); }

 private:
  EventHandle event_;  // work that waits for it still does after its destruction
};

}  // namespace

CudaTransfers::CudaTransfers(cudaStream_t compute)
    : compute_(compute), load_(make_stream()), store_(make_stream()) {}

CudaTransfers::~CudaTransfers() {
  for (cudaStream_t stream : {load_.get(), store_.get()}) cudaStreamSynchronize(stream);
}

std::shared_ptr<engine::Storage> CudaTransfers::host_buffer(int64_t bytes) {
  void* block = nullptr;
  const cudaError_t status =
      cudaHostAlloc(&block, static_cast<size_t>(bytes > 0 ? bytes : 1), cudaHostAllocDefault);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // or the next launch reports it
    throw Error(cat("out of host memory: ", bytes, " bytes of page-locked memory requested"));
  }
  BBB_CUDA(status);
  return std::make_shared<engine::Storage>(block, bytes, [block] { cudaFreeHost(block); });
}

void CudaTransfers::load(const engine::Tensor& dst, const void* src) {
  BBB_CUDA(cudaMemcpyAsync(dst.raw(), src, static_cast<size_t>(dst.bytes()), cudaMemcpyHostToDevice,
                           load_.get()));
}

void CudaTransfers::store(void* dst, const engine::Tensor& src) {
  BBB_CUDA(cudaMemcpyAsync(dst, src.raw(), static_cast<size_t>(src.bytes()), cudaMemcpyDeviceToHost,
                           store_.get()));
}

std::shared_ptr<engine::Fence> CudaTransfers::mark(engine::Lane lane) {
  return std::make_shared<EventFence>(stream_of(lane));
}

void CudaTransfers::follow(engine::Lane lane, engine::Fence& fence) {
  BBB_CUDA(cudaStreamWaitEvent(stream_of(lane), static_cast<EventFence&>(fence).event(), 0));
}

cudaStream_t CudaTransfers::stream_of(engine::Lane lane) const {
  switch (lane) {
    case engine::Lane::Load:
      return load_.get();
    case engine::Lane::Store:
      return store_.get();
    default:
      return compute_;
  }
}

}  // namespace bbb::cuda
#endif
