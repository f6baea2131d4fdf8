// Handle: the sole owner of an object of a CUDA library.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <type_traits>

#include "quant/launch.h"

namespace bbb::cuda {

template <typename Pointer, auto kDestroy>
struct Destroyer {
  // The status is ignored: at exit the driver, and the object with it, may be gone already.
  void operator()(Pointer object) const { kDestroy(object); }
};

template <typename Pointer, auto kDestroy>
using Handle = std::unique_ptr<std::remove_pointer_t<Pointer>, Destroyer<Pointer, kDestroy>>;

using StreamHandle = Handle<cudaStream_t, cudaStreamDestroy>;
using EventHandle = Handle<cudaEvent_t, cudaEventDestroy>;
using GraphHandle = Handle<cudaGraph_t, cudaGraphDestroy>;

// Not ordered with the legacy default stream.
inline StreamHandle make_stream() {
  cudaStream_t stream = nullptr;
  BBB_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return StreamHandle(stream);
}

inline EventHandle make_event(unsigned flags) {
  cudaEvent_t event = nullptr;
  BBB_CUDA(cudaEventCreateWithFlags(&event, flags));
  return EventHandle(event);
}

}  // namespace bbb::cuda
