// NcclComm: ranks on GPUs, one GPU each. Reductions run through NCCL, on a stream that forks from
// the backend's and joins it again, so that a recorded step holds them like its kernels. What ranks
// tell each other outside of steps goes through another Comm.
//
// NCCL is opened at run time (libnccl.so.2, any of version 2.10 or later). Its NVLink multicast is
// off (NCCL_NVLS_ENABLE=0), unless the environment says otherwise.
#pragma once

#include <memory>

#include "engine/backend.h"
#include "engine/comm.h"

namespace bbb::cuda {

// The GPU of a rank: that of its number on this host or, where a launcher lets every process see
// one GPU alone, that one. Throws if there are GPUs, but fewer than ranks; 0 if there are none.
int gpu_of_rank(int host_rank);

// `backend` is a CudaBackend, whose Replays must be gone before the result. `host`: a Comm of
// the same ranks for host values, which also carries NCCL's id. Throws if there is no NCCL.
std::shared_ptr<engine::Comm> make_nccl_comm(engine::Backend& backend,
                                             std::shared_ptr<engine::Comm> host);

}  // namespace bbb::cuda
