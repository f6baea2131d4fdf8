// The one way to launch a kernel, and the template behind the CUDA library check macros.
//
// launch() skips an empty grid, raises the kernel's shared-memory limit if it needs more than 48
// KiB, and checks the launch. If BBB_SYNC_LAUNCHES is set in the environment, it also waits for the
// kernel, so that the launch that caused a fault reports it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>

#include "quant/check.h"

namespace bbb::quant {

// Throws, naming the failing call, its place and the library's text for `status`.
template <typename Status, typename Describe>
void check_status(Status status, Status success, Describe describe, const char* call,
                  const char* file, int line) {
  if (status != success)
    throw Error(cat(describe(status), " in ", call, " (", file, ":", line, ")"));
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  int64_t smem_bytes = 0;
  // The kernel may start while the one in front of it in the stream still runs, and waits for it
  // itself (programmatic dependent launch, compute capability 9.0).
  bool early = false;
  unsigned cluster = 1;  // blocks, along x
};

inline bool sync_launches() {
  static const bool on = std::getenv("BBB_SYNC_LAUNCHES") != nullptr;
  return on;
}

}  // namespace bbb::quant

#define BBB_CUDA(call) \
  ::bbb::quant::check_status((call), cudaSuccess, cudaGetErrorString, #call, __FILE__, __LINE__)

#ifdef __CUDACC__
namespace bbb::quant {

template <typename... Params, typename... Args>
void launch(cudaStream_t stream, const LaunchShape& shape, void (*kernel)(Params...),
            Args&&... args) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  // 48 KiB need no permission. Static shared memory is part of them.
  constexpr int64_t kStatic = 8 * 1024;
  if (shape.smem_bytes > 48 * 1024 - kStatic)
    BBB_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shape.smem_bytes)));
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = static_cast<size_t>(shape.smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (shape.early) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    // A multiprocessor has one split into L1 and shared memory at a time. With the same one for all
    // such kernels, two of them run on it together.
    cudaLaunchAttribute& carveout = attributes[config.numAttrs++];
    carveout.id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    carveout.val.sharedMemCarveout = 100;  // percent
  }
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {shape.cluster, 1, 1};
  }
  BBB_CUDA(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
  if (sync_launches()) BBB_CUDA(cudaStreamSynchronize(stream));
}

}  // namespace bbb::quant
#endif
