// All kernels are built for the architectures of CMAKE_CUDA_ARCHITECTURES; one represents all.
#include "cuda/device_code.h"
#include "quant/launch.h"

namespace bbb::cuda {
namespace {

__global__ void empty_kernel() {}

}  // namespace

bool has_device_code() {
  cudaFuncAttributes attributes;
  const cudaError_t status =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(empty_kernel));
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    return false;
  }
  BBB_CUDA(status);
  return true;
}

}  // namespace bbb::cuda
