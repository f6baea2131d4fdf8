#ifdef BBB_HAS_CUDA
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "cuda/cuda_backend.h"
#include "cuda/host_waits.h"
#include "cuda/nccl_comm.h"

namespace bbb::cuda {
namespace {

// From nccl.h, whose types and values stay within version 2.
struct NcclId {
  char bytes[128];
};
using NcclCommunicator = struct NcclCommunicatorOpaque*;
constexpr int kNcclSuccess = 0;
enum NcclType : int { kNcclUint8 = 1, kNcclFloat32 = 7, kNcclFloat64 = 8, kNcclBFloat16 = 9 };
enum NcclOp : int { kNcclSum = 0, kNcclMax = 2, kNcclAverage = 4 };

// The functions in use, each by its name in the library.
class Nccl {
 public:
  int (*get_unique_id)(NcclId*);
  int (*init_rank)(NcclCommunicator*, int size, NcclId, int rank);
  int (*all_reduce)(const void*, void*, size_t, int type, int op, NcclCommunicator, cudaStream_t);
  // `count`: elements of a part.
  int (*reduce_scatter)(const void*, void*, size_t count, int type, int op, NcclCommunicator,
                        cudaStream_t);
  int (*all_gather)(const void*, void*, size_t count, int type, NcclCommunicator, cudaStream_t);
  int (*abort)(NcclCommunicator);
  const char* (*error_text)(int);

  static const Nccl& library() {
    static const Nccl nccl;
    return nccl;
  }

 private:
  Nccl() {
    // Unless they are set; NCCL reads them as it starts. A recorded step cannot make connections.
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    setenv("NCCL_RUNTIME_CONNECT", "0", 0);
    void* const library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    BBB_CHECK(library != nullptr, "several GPUs need NCCL, which cannot be opened: ", dlerror(),
              "; install it, or add its folder to LD_LIBRARY_PATH");
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      BBB_CHECK(function != nullptr, "libnccl.so.2 has no ", name);
    };
    find(get_unique_id, "ncclGetUniqueId");
    find(init_rank, "ncclCommInitRank");
    find(all_reduce, "ncclAllReduce");
    find(reduce_scatter, "ncclReduceScatter");
    find(all_gather, "ncclAllGather");
    find(abort, "ncclCommAbort");
    find(error_text, "ncclGetErrorString");
  }
};

#define BBB_NCCL(call)                                                                          \
  ::bbb::quant::check_status((call), kNcclSuccess, Nccl::library().error_text, #call, __FILE__, \
                             __LINE__)

int type_of(const Tensor& x) {
  switch (x.dtype()) {
    case DType::F32:
      return kNcclFloat32;
    case DType::F64:
      return kNcclFloat64;
    default:
      BBB_ASSERT(x.dtype() == DType::BF16);
      return kNcclBFloat16;
  }
}

int op_of(engine::Reduce op) {
  if (op == engine::Reduce::Max) return kNcclMax;
  return op == engine::Reduce::Mean ? kNcclAverage : kNcclSum;
}

// What the host sees of the count is in page-locked memory.
__global__ void count_kernel(int64_t* count, volatile int64_t* seen) { *seen = ++*count; }

// Its kernels come first where an SM is free, though products are queued that would fill all.
StreamHandle make_urgent_stream() {
  int least = 0, most = 0;
  BBB_CUDA(cudaDeviceGetStreamPriorityRange(&least, &most));
  cudaStream_t stream = nullptr;
  BBB_CUDA(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, most));
  return StreamHandle(stream);
}

class NcclComm final : public engine::Comm {
 public:
  NcclComm(CudaBackend& backend, std::shared_ptr<engine::Comm> host)
      : Comm(host->rank(), host->size(), host->host_ranks()),
        backend_(backend),
        host_(std::move(host)),
        stream_(make_urgent_stream()),
        counts_(backend.zeros({2 * sizeof(int64_t)}, DType::U8)) {
    void* seen = nullptr;
    BBB_CUDA(cudaMallocHost(&seen, 2 * sizeof(int64_t)));
    seen_.reset(new (seen) int64_t[2]{0, 0});
    NcclId id{};
    if (first()) BBB_NCCL(Nccl::library().get_unique_id(&id));
    const std::string bytes = host_->exchange({id.bytes, sizeof id.bytes})[0];
    BBB_ASSERT(bytes.size() == sizeof id.bytes);
    std::memcpy(id.bytes, bytes.data(), sizeof id.bytes);
    BBB_NCCL(Nccl::library().init_rank(&communicator_, size(), id, rank()));
    // The first of each kind makes NCCL's connections, which it cannot do while a step is recorded.
    const Tensor x = backend_.zeros({size()}, backend_.real());
    all_reduce(x, engine::Reduce::Sum);
    start_reduce_scatter(x, engine::Reduce::Sum);
    start_all_gather(x);
    join();
    backend_.synchronize();
    host_->watch_device([this] {
      return engine::DeviceSigns{std::atomic_ref(seen_.get()[kCollectives]).load(),
                                 std::atomic_ref(seen_.get()[kPasses]).load(), host_waits,
                                 waiting_threads > 0};
    });
  }
  // Not ncclCommDestroy, which waits for ranks that may be lost. No reduction is left.
  ~NcclComm() override {
    host_->watch_device({});
    Nccl::library().abort(communicator_);
  }

  void all_reduce(const Tensor& x, engine::Reduce op) override {
    start_all_reduce(x, op);
    join();
  }
  void start_all_reduce(const Tensor& x, engine::Reduce op) override {
    fork();
    BBB_NCCL(Nccl::library().all_reduce(x.raw(), x.raw(), static_cast<size_t>(x.numel()),
                                        type_of(x), op_of(op), communicator_, stream_.get()));
  }
  // Both in place, as NCCL knows from the addresses.
  void start_reduce_scatter(const Tensor& x, engine::Reduce op) override {
    fork();
    const Tensor own = part_of(x);
    BBB_NCCL(Nccl::library().reduce_scatter(x.raw(), own.raw(), static_cast<size_t>(own.numel()),
                                            type_of(x), op_of(op), communicator_, stream_.get()));
  }
  void start_all_gather(const Tensor& x) override {
    fork();
    const Tensor own = part_of(x);
    BBB_NCCL(Nccl::library().all_gather(own.raw(), x.raw(), static_cast<size_t>(own.bytes()),
                                        kNcclUint8, communicator_, stream_.get()));
  }
  // A recorded step may wait only for what it has forked.
  void join() override {
    if (std::exchange(forked_, false)) follow(backend_.stream(), stream_.get());
  }
  std::vector<std::string> exchange(const std::string& bytes) override {
    return host_->exchange(bytes);
  }
  void show_work() override { count(backend_.stream(), kPasses); }

 private:
  void fork() {
    follow(stream_.get(), backend_.stream());
    forked_ = true;
    count(stream_.get(), kCollectives);
  }
  void count(cudaStream_t stream, int what) {
    launch(stream, {dim3(1), dim3(1)}, count_kernel, static_cast<int64_t*>(counts_.raw()) + what,
           seen_.get() + what);
  }
  // What is submitted to `stream` from now on waits for all that is on `other`.
  static void follow(cudaStream_t stream, cudaStream_t other) {
    const EventHandle event = make_event(cudaEventDisableTiming);
    BBB_CUDA(cudaEventRecord(event.get(), other));
    BBB_CUDA(cudaStreamWaitEvent(stream, event.get(), 0));
  }

  CudaBackend& backend_;
  const std::shared_ptr<engine::Comm> host_;
  const StreamHandle stream_;
  // What the GPU has come to. Each is counted on a stream of its own.
  static constexpr int kCollectives = 0, kPasses = 1;
  const Tensor counts_;                  // I64 (2)
  Handle<int64_t*, cudaFreeHost> seen_;  // the same, for the host: page-locked
  bool forked_ = false;
  NcclCommunicator communicator_ = nullptr;
};

}  // namespace

int gpu_of_rank(int host_rank) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  BBB_CHECK(count == 1 || host_rank < count, "rank ", host_rank,
            " of this host has no GPU: the host has ", count);
  return count == 1 ? 0 : host_rank;
}

std::shared_ptr<engine::Comm> make_nccl_comm(engine::Backend& backend,
                                             std::shared_ptr<engine::Comm> host) {
  auto* const gpu = dynamic_cast<CudaBackend*>(&backend);
  BBB_ASSERT(gpu != nullptr);
  return std::make_shared<NcclComm>(*gpu, std::move(host));
}

}  // namespace bbb::cuda
#endif
