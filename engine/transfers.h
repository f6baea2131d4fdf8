// Transfers: copies between host memory and the device that overlap with the ops.
//
// Work is submitted to lanes. A lane runs its work in order; lanes overlap with each other. Fences
// order work between lanes:
//
//     load(slot, host);  loaded = mark(Lane::Load);  follow(Lane::Compute, *loaded)
//
//     Load      load | fence
//     Compute              '-> ops that read slot
//
// The CPU backend runs everything at submission, so every fence has been passed.
#pragma once

#include <memory>

#include "engine/tensor.h"

namespace bbb::engine {

// Compute: the backend's ops. Load: host to device. Store: device to host.
enum class Lane { Compute, Load, Store };

// A point in a lane's work.
class Fence {
 public:
  virtual ~Fence() = default;
  virtual void wait() = 0;  // blocks the host until the lane has passed this point
};

class Transfers {
 public:
  virtual ~Transfers() = default;

  // Host memory for load and store, page-aligned; page-locked on a GPU. Throws, naming the bytes,
  // if the machine does not have them.
  virtual std::shared_ptr<Storage> host_buffer(int64_t bytes) = 0;
  // dst <- src, the tensor's bytes, in the lane of the same name. The host side must be in a
  // host_buffer and must stay unchanged until the copy is done.
  virtual void load(const Tensor& dst, const void* src) = 0;
  virtual void store(void* dst, const Tensor& src) = 0;
  virtual std::shared_ptr<Fence> mark(Lane lane) = 0;  // after all work submitted to `lane` so far
  // Work submitted to `lane` after this call waits for the fence.
  virtual void follow(Lane lane, Fence& fence) = 0;
};

}  // namespace bbb::engine
