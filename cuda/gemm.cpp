// y = alpha x w^T (+ addend), dx (+)= alpha dy w, dw (+)= dy^T x through cuBLASLt: bf16 operands,
// FP32 accumulation and scaling, bf16 or F32 out. M tokens, N output and K input features.
#ifdef BBB_HAS_CUDA
#include "cuda/gemm.h"

#include <algorithm>
#include <utility>

#include "cuda/cuda_backend.h"
#include "cuda/gemv.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr float kHostConstants[2] = {0.0f, 1.0f};

int alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return static_cast<int>(std::min<uintptr_t>(16, address & -address));
}

template <typename T>
void set(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute, T value) {
  BBB_CUBLAS(cublasLtMatmulDescSetAttribute(product, attribute, &value, sizeof value));
}

template <typename T>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
         T value) {
  BBB_CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
}

cublasLtMatrixLayout_t packed_layout(cudaDataType_t dtype, int64_t rows, int64_t columns) {
  cublasLtMatrixLayout_t layout = nullptr;
  BBB_CUBLAS(cublasLtMatrixLayoutCreate(&layout, dtype, static_cast<uint64_t>(rows),
                                        static_cast<uint64_t>(columns), rows));
  return layout;
}

struct Preference {
  Preference() { BBB_CUBLAS(cublasLtMatmulPreferenceCreate(&handle)); }
  ~Preference() { cublasLtMatmulPreferenceDestroy(handle); }
  Preference(const Preference&) = delete;
  Preference& operator=(const Preference&) = delete;
  cublasLtMatmulPreference_t handle = nullptr;
};

cudaDataType_t cuda_type(DType dtype) { return dtype == DType::BF16 ? CUDA_R_16BF : CUDA_R_32F; }

const float* pointer_or_null(const Tensor& alpha) {
  return alpha.defined() ? alpha.data<float>() : nullptr;
}

}  // namespace

GemmPlanner::GemmPlanner(cudaStream_t stream, std::shared_ptr<engine::MemoryPool> pool)
    : stream_(stream), pool_(std::move(pool)) {
  cublasLtHandle_t handle = nullptr;
  BBB_CUBLAS(cublasLtCreate(&handle));
  handle_.reset(handle);
  void* workspace = nullptr;
  BBB_CUDA(cudaMalloc(&workspace, kGemmWorkspaceBytes + sizeof kHostConstants));
  own_workspace_.reset(static_cast<char*>(workspace));
  workspace_ = own_workspace_.get();
  constants_ = reinterpret_cast<float*>(workspace_ + kGemmWorkspaceBytes);
  BBB_CUDA(cudaMemcpyAsync(constants_, kHostConstants, sizeof kHostConstants,
                           cudaMemcpyHostToDevice, stream_));
  BBB_CUDA(cudaStreamSynchronize(stream_));
}

GemmPlanner::Plan GemmPlanner::make_plan(const GemmShape& s) const {
  const bool plain_a = s.op_a == CUBLAS_OP_N, plain_b = s.op_b == CUBLAS_OP_N;
  Plan plan;
  cublasLtMatmulDesc_t product = nullptr;
  BBB_CUBLAS(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  plan.product.reset(product);
  set(product, CUBLASLT_MATMUL_DESC_TRANSA, s.op_a);
  set(product, CUBLASLT_MATMUL_DESC_TRANSB, s.op_b);
  set(product, CUBLASLT_MATMUL_DESC_POINTER_MODE,
      s.alpha_on_device ? CUBLASLT_POINTER_MODE_DEVICE : CUBLASLT_POINTER_MODE_HOST);
  plan.a.reset(packed_layout(CUDA_R_16BF, plain_a ? s.m : s.k, plain_a ? s.k : s.m));
  plan.b.reset(packed_layout(CUDA_R_16BF, plain_b ? s.k : s.n, plain_b ? s.n : s.k));
  plan.out.reset(packed_layout(s.out, s.m, s.n));
  plan.algorithm = suggestions(plan, s, 1).front();
  return plan;
}

std::vector<GemmAlgorithm> GemmPlanner::suggestions(const Plan& plan, const GemmShape& s,
                                                    int at_most) const {
  const Preference preference;
  set(preference.handle, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
      static_cast<uint64_t>(kGemmWorkspaceBytes));
  // Split-K partials are summed in the workspace, in FP32: no atomics, no rounding in between.
  set(preference.handle, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  set(preference.handle, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
      static_cast<uint32_t>(s.align_a));
  set(preference.handle, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
      static_cast<uint32_t>(s.align_b));
  set(preference.handle, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
      static_cast<uint32_t>(s.align_c));
  set(preference.handle, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
      static_cast<uint32_t>(s.align_d));

  std::vector<cublasLtMatmulHeuristicResult_t> results(static_cast<size_t>(at_most));
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle_.get(), plan.product.get(), plan.a.get(), plan.b.get(), plan.out.get(), plan.out.get(),
      preference.handle, at_most, results.data(), &found);
  std::vector<GemmAlgorithm> algorithms;
  for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < found; ++i)
    if (results[static_cast<size_t>(i)].state == CUBLAS_STATUS_SUCCESS)
      algorithms.push_back(results[static_cast<size_t>(i)].algo);
  BBB_CHECK(!algorithms.empty(), "cuBLASLt has no algorithm for a product of ", s.m, " x ", s.k,
            " by ", s.k, " x ", s.n, " (", cublasLtGetStatusString(status), ")");
  return algorithms;
}

const GemmPlanner::Plan& GemmPlanner::plan_for(const GemmShape& shape) {
  auto found = plans_.find(shape);
  if (found == plans_.end()) {
    Plan plan = make_plan(shape);
    apply_tuning(plan, shape);
    found = plans_.emplace(shape, std::move(plan)).first;
  }
  if (!found->second.decided) {
    ++found->second.encounters;
    if (!is_capturing(stream_)) decide(tuning_->product_runs);
  }
  return found->second;
}

void GemmPlanner::launch(const Plan& plan, const GemmShape& shape, const GemmAlgorithm& algorithm,
                         void* d, const void* a, const void* b, const void* c, const float* alpha) {
  const float* constants = shape.alpha_on_device ? constants_ : kHostConstants;
  BBB_CUBLAS(cublasLtMatmul(
      handle_.get(), plan.product.get(), shape.alpha_on_device ? alpha : &constants[1], a,
      plan.a.get(), b, plan.b.get(), &constants[shape.accumulate ? 1 : 0], c, plan.out.get(), d,
      plan.out.get(), &algorithm, workspace_, kGemmWorkspaceBytes, stream_));
}

void GemmPlanner::run(GemmShape shape, void* d, const void* a, const void* b, const void* c,
                      const float* alpha) {
  if (!shape.accumulate) c = d;
  shape.align_a = alignment_of(a);
  shape.align_b = alignment_of(b);
  shape.align_c = alignment_of(c);
  shape.align_d = alignment_of(d);
  const Plan& plan = plan_for(shape);
  launch(plan, shape, plan.algorithm, d, a, b, c, alpha);
  if (quant::sync_launches()) BBB_CUDA(cudaStreamSynchronize(stream_));
}

// y^T (N, M) = w (N, K) x^T (K, M)
void CudaBackend::do_gemm_nt(const Tensor& y, const Tensor& x, const Tensor& w, const Tensor& alpha,
                             const Tensor& addend) {
  const int64_t m = x.dim(0), n = w.dim(0), k = w.dim(1);
  if (y.numel() == 0) return;
  Tensor c = addend;
  if (c.defined() && c.dtype() != y.dtype()) {  // C must have D's type
    do_cast(y, addend);
    c = y;
  }
  if (k == 0) {
    if (!c.defined()) return do_zero(y);
    if (c.raw() != y.raw()) do_copy(y, c);
    return;
  }
  if (has_warpgroup_products() && takes_gemv(m, k) && !alpha.defined() && !c.defined() &&
      aligned(x, w)) {
    const bool narrow = y.dtype() == DType::BF16;
    return launch_gemv(stream_, properties_.multiProcessorCount, narrow ? bf16_of(y) : nullptr,
                       narrow ? nullptr : y.data<float>(), bf16_of(x), bf16_of(w), n, k);
  }
  gemm_->run({.op_a = CUBLAS_OP_T,
              .op_b = CUBLAS_OP_N,
              .m = n,
              .n = m,
              .k = k,
              .out = cuda_type(y.dtype()),
              .alpha_on_device = alpha.defined(),
              .accumulate = c.defined()},
             y.raw(), w.raw(), x.raw(), c.raw(), pointer_or_null(alpha));
}

// dx^T (K, M) = w^T (K, N) dy^T (N, M)
void CudaBackend::do_gemm_nn(const Tensor& dx, const Tensor& dy, const Tensor& w,
                             const Tensor& alpha, Write mode) {
  const int64_t m = dy.dim(0), n = w.dim(0), k = w.dim(1);
  if (dx.numel() == 0) return;
  if (n == 0) return mode == Write::Add ? void() : do_zero(dx);
  gemm_->run({.op_a = CUBLAS_OP_N,
              .op_b = CUBLAS_OP_N,
              .m = k,
              .n = m,
              .k = n,
              .out = cuda_type(dx.dtype()),
              .alpha_on_device = alpha.defined(),
              .accumulate = mode == Write::Add},
             dx.raw(), w.raw(), dy.raw(), dx.raw(), pointer_or_null(alpha));
}

// dw^T (K, N) = x^T (K, M) dy (M, N)
void CudaBackend::do_gemm_tn(const Tensor& dw, const Tensor& dy, const Tensor& x, Write mode) {
  const int64_t m = dy.dim(0), n = dw.dim(0), k = dw.dim(1);
  if (dw.numel() == 0) return;
  if (m == 0) return mode == Write::Add ? void() : do_zero(dw);
  gemm_->run({.op_a = CUBLAS_OP_N,
              .op_b = CUBLAS_OP_T,
              .m = k,
              .n = n,
              .k = m,
              .out = cuda_type(dw.dtype()),
              .alpha_on_device = false,
              .accumulate = mode == Write::Add},
             dw.raw(), x.raw(), dy.raw(), dw.raw(), nullptr);
}

}  // namespace bbb::cuda
#endif
