// Replaces the CUDA backend in a build without nvcc, or with one that is too old.
#ifndef BBB_HAS_CUDA
#include "engine/backend.h"

namespace bbb::engine {

std::unique_ptr<Backend> make_cuda_backend(int) {
  throw Error("this bbb was built without CUDA: use --device cpu, or build with CUDA 13 or newer");
}

bool cuda_available() { return false; }

}  // namespace bbb::engine
#endif
