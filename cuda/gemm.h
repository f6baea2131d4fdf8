// GemmPlanner: cuBLASLt behind the three matrix products.
//
// A row-major (R, C) matrix is the column-major (C, R) one, so each product is written for its
// transposed output. Plans are kept per shape; the algorithm is the heuristics' first among those
// that sum split-K partials in a fixed order, so the same inputs give the same bytes. One
// workspace, allocated once, serves every product of the stream and stays put for recorded graphs.
#pragma once

#include <cublasLt.h>

#include <compare>
#include <cstdint>
#include <map>

namespace bbb::cuda {

// D (m, n) = alpha * op(A) op(B) + beta * C, column-major and packed; A, B bf16.
struct GemmShape {
  cublasOperation_t op_a, op_b;
  int64_t m, n, k;
  cudaDataType_t out;                                      // of C and D: CUDA_R_16BF or CUDA_R_32F
  bool alpha_on_device;                                    // else 1
  bool accumulate;                                         // beta 1, else 0
  int align_a = 0, align_b = 0, align_c = 0, align_d = 0;  // bytes, at most 16: found by run()

  auto operator<=>(const GemmShape&) const = default;
};

class GemmPlanner {
 public:
  explicit GemmPlanner(cudaStream_t stream);
  ~GemmPlanner();
  GemmPlanner(const GemmPlanner&) = delete;
  GemmPlanner& operator=(const GemmPlanner&) = delete;

  // `alpha` on the device, or nullptr for 1. `c` is read only where shape.accumulate; may be `d`.
  void run(GemmShape shape, void* d, const void* a, const void* b, const void* c,
           const float* alpha);

 private:
  struct Plan {
    cublasLtMatmulDesc_t product = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, out = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
    Plan() = default;
    ~Plan();
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;
  };
  void prepare(Plan& plan, const GemmShape& shape) const;

  cudaStream_t stream_;
  cublasLtHandle_t handle_ = nullptr;
  char* workspace_ = nullptr;
  float* constants_ = nullptr;  // on the device: 0, 1
  std::map<GemmShape, Plan> plans_;
};

}  // namespace bbb::cuda
