// CudaBackend: choosing the GPU, memory, transfers, and recording a step as a CUDA graph.
#ifdef BBB_HAS_CUDA
#include "cuda/cuda_backend.h"

#include <algorithm>
#include <cstdlib>
#include <utility>
#include <vector>

#include "cuda/device_code.h"
#include "cuda/gemm.h"
#include "cuda/host_waits.h"
#include "cuda/reduce.h"
#include "cuda/transfers.h"

namespace bbb::cuda {
namespace {

constexpr int kOldestMajor = 8;  // bf16 tensor cores and cp.async: sm_80

int gpu_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

// While this object lives, the stream records instead of executing; allocations use `own`.
class Capture {
 public:
  Capture(cudaStream_t stream, std::shared_ptr<MemoryPool>& current,
          std::shared_ptr<MemoryPool> own)
      : stream_(stream), current_(current), outer_(current) {
    // Relaxed: the pool calls cudaMalloc and libraries load kernels while the stream records.
    BBB_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    current_ = std::move(own);
  }
  ~Capture() {
    current_ = outer_;
    if (ended_) return;
    cudaGraph_t abandoned = nullptr;
    cudaStreamEndCapture(stream_, &abandoned);
    if (abandoned != nullptr) cudaGraphDestroy(abandoned);
    cudaGetLastError();  // the step's own exception reports the error
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  GraphHandle end() {
    ended_ = true;
    cudaGraph_t graph = nullptr;
    BBB_CUDA(cudaStreamEndCapture(stream_, &graph));
    return GraphHandle(graph);
  }

 private:
  cudaStream_t stream_;
  std::shared_ptr<MemoryPool>& current_;
  std::shared_ptr<MemoryPool> outer_;
  bool ended_ = false;
};

int64_t count_kernels(cudaGraph_t graph) {
  size_t count = 0;
  BBB_CUDA(cudaGraphGetNodes(graph, nullptr, &count));
  std::vector<cudaGraphNode_t> nodes(count);
  BBB_CUDA(cudaGraphGetNodes(graph, nodes.data(), &count));
  return std::count_if(nodes.begin(), nodes.end(), [](cudaGraphNode_t node) {
    cudaGraphNodeType type = cudaGraphNodeTypeEmpty;
    BBB_CUDA(cudaGraphNodeGetType(node, &type));
    return type == cudaGraphNodeTypeKernel;
  });
}

class GraphReplay final : public Replay {
 public:
  // `step` keeps the tensors alive that it holds, `pools` those that it allocated. All recordings
  // share the pools: what one run has freed is dead before another one starts on the same stream.
  GraphReplay(cudaStream_t stream, cudaGraph_t graph, std::function<void()> step,
              std::shared_ptr<RecordingPools> pools)
      : stream_(stream),
        step_(std::move(step)),
        pools_(std::move(pools)),
        kernels_(count_kernels(graph)) {
    cudaGraphExec_t executable = nullptr;
    BBB_CUDA(cudaGraphInstantiate(&executable, graph, 0));
    executable_.reset(executable);
  }
  ~GraphReplay() override {
    cudaDeviceSynchronize();  // the last run may still be using the pools
    cudaGetLastError();
  }
  void run() override { BBB_CUDA(cudaGraphLaunch(executable_.get(), stream_)); }
  int64_t kernels() const override { return kernels_; }

 private:
  cudaStream_t stream_;
  std::function<void()> step_;
  std::shared_ptr<RecordingPools> pools_;
  int64_t kernels_ = 0;
  Handle<cudaGraphExec_t, cudaGraphExecDestroy> executable_;
};

// BBB_SYNC_LAUNCHES waits for every launch, which is impossible while a stream records.
class DirectReplay final : public Replay {
 public:
  explicit DirectReplay(std::function<void()> step) : step_(std::move(step)) {}
  void run() override { step_(); }

 private:
  std::function<void()> step_;
};

}  // namespace

std::shared_ptr<engine::DeviceMemory> device_memory() {
  auto memory = std::make_shared<engine::DeviceMemory>();
  memory->allocate = [](int64_t bytes) -> void* {
    void* slab = nullptr;
    const cudaError_t status = cudaMalloc(&slab, static_cast<size_t>(bytes));
    if (status != cudaErrorMemoryAllocation) {
      BBB_CUDA(status);
      return slab;
    }
    cudaGetLastError();  // or the next launch reports it
    return nullptr;
  };
  // The status is ignored: at exit the driver, and the memory with it, may be gone already.
  memory->release = [](void* slab) {
    cudaFree(slab);
    cudaGetLastError();
  };
  memory->room = [] {
    size_t free = 0, total = 0;
    BBB_CUDA(cudaMemGetInfo(&free, &total));
    return cat(free, " free of ", total);
  };
  return memory;
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  BBB_CUDA(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

CudaBackend::CudaBackend(int device) {
  const int count = gpu_count();
  BBB_CHECK(count > 0, "no usable NVIDIA GPU: the CUDA driver finds none (try --device cpu)");
  BBB_CHECK(device >= 0 && device < count, "there is no GPU ", device, ": this machine has ",
            count);
  BBB_CUDA(cudaGetDeviceProperties(&properties_, device));
  BBB_CHECK(properties_.major >= kOldestMajor, "GPU ", device, " (", properties_.name, ", sm_",
            properties_.major, properties_.minor, ") is too old: bbb needs sm_80 or newer");
  BBB_CUDA(cudaSetDevice(device));
  const bool hopper = properties_.major == 9 && properties_.minor == 0;
  BBB_CHECK(has_device_code(), "this bbb was built for the CUDA architectures ",
            BBB_CUDA_ARCHITECTURES, " and has no code for GPU ", device, " (", properties_.name,
            "): build it with -DCMAKE_CUDA_ARCHITECTURES=", properties_.major, properties_.minor,
            hopper ? "a" : "");
  own_stream_ = make_stream();
  stream_ = own_stream_.get();
  pool_ = std::make_shared<MemoryPool>(device_memory(), engine::Reclaim::OnPressure);
  gemm_ = std::make_unique<GemmPlanner>(stream_, pool_);
  transfers_ = std::make_unique<CudaTransfers>(stream_);
  void* fault = nullptr;
  BBB_CUDA(cudaMallocHost(&fault, sizeof(CacheFault)));
  cache_fault_.reset(new (fault) CacheFault{});
  BBB_CUDA(cudaMallocHost(&fault, sizeof(LogitFault)));
  logit_fault_.reset(new (fault) LogitFault{});
}

// Members are destroyed in reverse order, the stream last.
CudaBackend::~CudaBackend() { cudaStreamSynchronize(stream_); }

bool CudaBackend::has_warpgroup_products() const {
#ifdef BBB_SM90A
  static const bool generic = std::getenv("BBB_GENERIC_KERNELS") != nullptr;
  return !generic && properties_.major == 9 && properties_.minor == 0;
#else
  return false;
#endif
}

std::string CudaBackend::device_name() const { return properties_.name; }

int64_t CudaBackend::memory_total_bytes() const {
  return static_cast<int64_t>(properties_.totalGlobalMem);
}

int64_t CudaBackend::memory_available_bytes() const {
  size_t free = 0, total = 0;
  BBB_CUDA(cudaMemGetInfo(&free, &total));
  return static_cast<int64_t>(free) + pool_->cached_bytes();
}

int64_t CudaBackend::memory_peak_bytes() const { return pool_->peak_bytes(); }

void CudaBackend::reset_memory_peak() { pool_->reset_peak(); }

int64_t CudaBackend::block_bytes(int64_t bytes) const { return MemoryPool::block_bytes(bytes); }

int64_t CudaBackend::scratch_bytes(engine::ScratchOp op, const Shape& shape) const {
  using engine::ScratchOp;
  switch (op) {
    case ScratchOp::Mse:
    case ScratchOp::Sum:
    case ScratchOp::StepControl:
      return kPartials * int64_t{sizeof(float)};
    case ScratchOp::Attention:
      return sizeof(unsigned);  // the queue of the Hopper kernel
    case ScratchOp::RmsNormBackward:
      return rms_norm_backward_scratch_bytes(shape[0], shape[1]);
    case ScratchOp::InputScaleGradient:
      return input_scale_gradient_scratch_bytes(shape[0], shape[1]);
    case ScratchOp::LcWeightBackward:
      return lc_weight_backward_scratch_bytes(shape[0], shape[1]);
    case ScratchOp::LoraWeightBackward:
      return lora_weight_backward_scratch_bytes(shape[0], shape[1], shape[2]);
    case ScratchOp::ChannelMoments:
      return channel_moments_scratch_bytes(shape[0], shape[1]);
    case ScratchOp::Sample:
      return sample_scratch_bytes(shape[0], shape[1]);
    case ScratchOp::AttentionCached:
      return attention_cached_scratch_bytes(shape, properties_.multiProcessorCount);
    case ScratchOp::EmbedBackward:
      return embed_backward_scratch_bytes(shape[0], shape[1]);
  }
  BBB_ASSERT(false);
}

void CudaBackend::synchronize() {
  const HostWait wait;
  BBB_CUDA(cudaStreamSynchronize(stream_));
  check_faults();
}

void CudaBackend::check_faults() {
  const CacheFault fault = std::exchange(*cache_fault_, CacheFault{});
  const LogitFault logit = std::exchange(*logit_fault_, LogitFault{});
  BBB_CHECK(fault.t == 0, "positions ", fault.start, " to ", int64_t{fault.start} + fault.t - 1,
            " of a key-value cache of ", fault.capacity);
  BBB_CHECK(!logit.found, "the logit of token ", logit.token, " is ", logit.logit,
            ": no next token can be chosen");
}

std::string CudaBackend::gemm_library() const {
  return cat("cuBLASLt ", cublasLtGetVersion(), " on ", device_name());
}

void CudaBackend::tune_gemms(std::optional<engine::GemmTuning> tuning) {
  BBB_ASSERT(!tuning || !gemm_->tuned());
  if (tuning) {
    engine::GemmChoices& known = tuning->known;
    BBB_CHECK(known.algorithms.empty() || known.made_by == gemm_library(), tuning->where,
              ": GEMM algorithms chosen by ", known.made_by, "; here is ", gemm_library());
    known.made_by = gemm_library();
  }
  gemm_->tune(std::move(tuning));
}

std::unique_ptr<Replay> CudaBackend::record(std::function<void()> step) {
  BBB_CHECK(!is_capturing(stream_), "a step is being recorded already");
  if (quant::sync_launches()) return std::make_unique<DirectReplay>(std::move(step));
  for (;;) {
    // No memory can return to the driver while the stream records: release it now.
    synchronize();
    pool_->release_cached();
    std::shared_ptr<RecordingPools> own = recordings_.lock();
    if (!own) {
      own = std::make_shared<RecordingPools>(pool_->device());
      recordings_ = own;
    }
    GraphHandle graph;
    {
      Capture capture(stream_, pool_, own->main);
      step();
      graph = capture.end();
    }
    if (!gemm_->has_undecided())
      return std::make_unique<GraphReplay>(stream_, graph.get(), std::move(step), std::move(own));
    // Timing needs memory: release this recording's pools first, unless others hold them too.
    graph.reset();
    own.reset();
    gemm_->decide_recorded();
  }
}

void CudaBackend::overlap(const std::function<void()>& side, const std::function<void()>& main) {
  const std::shared_ptr<RecordingPools> pools = recordings_.lock();
  if (!is_capturing(stream_) || !pools || pool_ != pools->main) {
    side();
    main();
    return;
  }
  if (!side_stream_) {
    side_stream_ = make_stream();
    void* workspace = nullptr;
    BBB_CUDA(cudaMalloc(&workspace, kGemmWorkspaceBytes));
    side_workspace_.reset(static_cast<char*>(workspace));
  }
  const cudaStream_t main_stream = stream_, side_stream = side_stream_.get();
  const EventHandle fork = make_event(cudaEventDisableTiming);
  const EventHandle join = make_event(cudaEventDisableTiming);
  BBB_CUDA(cudaEventRecord(fork.get(), main_stream));
  BBB_CUDA(cudaStreamWaitEvent(side_stream, fork.get(), 0));
  const auto go_back = [&] {
    stream_ = main_stream;
    pool_ = pools->main;
  };
  stream_ = side_stream;
  pool_ = pools->side;
  try {
    const GemmPlanner::OnStream products(*gemm_, side_stream, side_workspace_.get());
    side();
  } catch (...) {
    go_back();
    throw;
  }
  go_back();
  BBB_CUDA(cudaEventRecord(join.get(), side_stream));
  main();
  BBB_CUDA(cudaStreamWaitEvent(main_stream, join.get(), 0));
}

Tensor CudaBackend::do_empty(Shape shape, DType dtype) {
  const int64_t numel = engine::numel_of(shape);
  return Tensor(pool_->allocate(numel * engine::size_bytes(dtype)), 0, std::move(shape), dtype,
                DeviceType::Cuda);
}

void CudaBackend::do_upload(const Tensor& dst, const void* src) {
  BBB_CHECK(!is_capturing(stream_), "host memory cannot be read in a recorded step");
  const HostWait wait;  // a copy from or to pageable memory waits for what is in front of it
  BBB_CUDA(cudaMemcpyAsync(dst.raw(), src, static_cast<size_t>(dst.bytes()), cudaMemcpyHostToDevice,
                           stream_));
  synchronize();
}

void CudaBackend::do_download(void* dst, const Tensor& src) {
  BBB_CHECK(!is_capturing(stream_), "host memory cannot be written in a recorded step");
  const HostWait wait;
  BBB_CUDA(cudaMemcpyAsync(dst, src.raw(), static_cast<size_t>(src.bytes()), cudaMemcpyDeviceToHost,
                           stream_));
  synchronize();
}

void CudaBackend::do_copy(const Tensor& dst, const Tensor& src) {
  BBB_CUDA(cudaMemcpyAsync(dst.raw(), src.raw(), static_cast<size_t>(dst.bytes()),
                           cudaMemcpyDeviceToDevice, stream_));
}

void CudaBackend::do_zero(const Tensor& dst) {
  BBB_CUDA(cudaMemsetAsync(dst.raw(), 0, static_cast<size_t>(dst.bytes()), stream_));
}

}  // namespace bbb::cuda

namespace bbb::engine {

std::unique_ptr<Backend> make_cuda_backend(int device) {
  return std::make_unique<cuda::CudaBackend>(device);
}

bool cuda_available() {
  for (int device = 0; device < cuda::gpu_count(); ++device) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        major >= cuda::kOldestMajor)
      return true;
  }
  return false;
}

}  // namespace bbb::engine
#endif
