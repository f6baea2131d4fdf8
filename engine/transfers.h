// Transfers: copies between host memory and the device that run beside the ops.
//
// Work is given to lanes. A lane does its work in order; lanes run side by side, and what must
// happen first is said with fences:
//
//     load(slot, host, bytes);  loaded = mark(Lane::Load);  follow(Lane::Compute, *loaded)
//
// The CPU backend does everything at once, so there every mark is reached already.
#pragma once

#include <memory>

#include "engine/tensor.h"

namespace bbb::engine {

// Compute: where the backend's ops run. Load and Store: from and to host memory.
enum class Lane { Compute, Load, Store };

// A point in a lane's work.
class Fence {
 public:
  virtual ~Fence() = default;
  virtual void wait() = 0;  // until the lane has come past it; for the host
};

class Transfers {
 public:
  virtual ~Transfers() = default;

  // Host memory for load and store, page-aligned; page-locked on a GPU. Throws, naming the bytes,
  // where the machine has no room.
  virtual std::shared_ptr<Storage> host_buffer(int64_t bytes) = 0;
  // dst <- src, the tensor's bytes, in the lane of the same name. The host side must
  // lie in a host_buffer and stay as it is until the copy is done.
  virtual void load(const Tensor& dst, const void* src) = 0;
  virtual void store(void* dst, const Tensor& src) = 0;
  virtual std::shared_ptr<Fence> mark(Lane lane) = 0;
  // What `lane` is given from now on runs behind the fence.
  virtual void follow(Lane lane, Fence& fence) = 0;
};

}  // namespace bbb::engine
