// Replaces the CUDA backend in a build without nvcc, or with one that is too old.
#ifndef BBB_HAS_CUDA
#include "cuda/nccl_comm.h"
#include "engine/backend.h"

namespace bbb::engine {

std::unique_ptr<Backend> make_cuda_backend(int) {
  throw Error("this bbb was built without CUDA: use --device cpu, or build with CUDA 13 or newer");
}

bool cuda_available() { return false; }

}  // namespace bbb::engine

namespace bbb::cuda {

int gpu_of_rank(int) { return 0; }  // make_cuda_backend() says why there is none

std::shared_ptr<engine::Comm> make_nccl_comm(engine::Backend&, std::shared_ptr<engine::Comm>) {
  throw Error("this bbb was built without CUDA: it has no NCCL");
}

}  // namespace bbb::cuda
#endif
