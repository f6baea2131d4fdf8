// GemmPlanner: the three matrix products through cuBLASLt.
//
// A row-major (R, C) matrix is a column-major (C, R) one, so each product computes its transposed
// output. Plans are kept per shape. Only algorithms that sum split-K partials in a fixed order are
// used, so the same inputs give the same bytes. Each stream has one workspace for all its products,
// allocated once, so that recorded graphs can keep its address.
//
// A product takes the heuristics' first suggestion. While tuned, a large product instead takes the
// fastest of the heuristics' suggestions, timed at its first encounter (gemm_tuning.cpp). If the
// run will spend long on it, the library's other kernels (gemm_search.cpp) are candidates too.
// Nothing can be timed while the stream records: the plan stays undecided until decide_recorded().
#pragma once

#include <cublasLt.h>

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda/handle.h"
#include "engine/gemm_choices.h"

namespace bbb::cuda {

inline constexpr int64_t kGemmWorkspaceBytes = int64_t{32} << 20;

// D (m, n) = alpha * op(A) op(B) + beta * C, column-major and packed; A, B bf16.
struct GemmShape {
  cublasOperation_t op_a, op_b;
  int64_t m, n, k;
  cudaDataType_t out;                                      // of C and D: CUDA_R_16BF or CUDA_R_32F
  bool alpha_on_device;                                    // else 1
  bool accumulate;                                         // beta 1, else 0
  int align_a = 0, align_b = 0, align_c = 0, align_d = 0;  // bytes, at most 16; set by run()

  auto operator<=>(const GemmShape&) const = default;
  double flops() const { return 2.0 * static_cast<double>(m) * static_cast<double>(n * k); }
};

// The product's key in GemmChoices; unique to the shape.
std::string to_string(const GemmShape& shape);

using GemmAlgorithm = cublasLtMatmulAlgo_t;  // plain bytes, valid for one version of the library

class GemmPlanner {
 public:
  // Timing allocates from `pool`.
  GemmPlanner(cudaStream_t stream, std::shared_ptr<MemoryPool> pool);

  // `alpha` on the device, or nullptr for 1. `c` is read only where shape.accumulate; may be `d`.
  void run(GemmShape shape, void* d, const void* a, const void* b, const void* c,
           const float* alpha);

  // While this object lives, products run on `stream` with `workspace` (kGemmWorkspaceBytes).
  class OnStream {
   public:
    OnStream(GemmPlanner& planner, cudaStream_t stream, char* workspace)
        : planner_(planner), stream_(planner.stream_), workspace_(planner.workspace_) {
      planner.stream_ = stream;
      planner.workspace_ = workspace;
    }
    ~OnStream() {
      planner_.stream_ = stream_;
      planner_.workspace_ = workspace_;
    }
    OnStream(const OnStream&) = delete;
    OnStream& operator=(const OnStream&) = delete;

   private:
    GemmPlanner& planner_;
    cudaStream_t stream_;
    char* workspace_;
  };

  // Implements Backend::tune_gemms. Drops all plans.
  void tune(std::optional<engine::GemmTuning> tuning);
  bool tuned() const { return tuning_.has_value(); }
  // A recording encountered products to be timed: call decide_recorded(), then record again.
  bool has_undecided() const;
  void decide_recorded();
  // All possible choices for this product; the heuristics' first suggestion comes first.
  std::vector<std::string> candidates(const GemmShape& shape) const;

 private:
  struct Plan {
    Handle<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> product;
    Handle<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy> a, b, out;
    GemmAlgorithm algorithm{};
    bool decided = false;    // `algorithm` is final
    int64_t encounters = 0;  // until decided: the products of a recorded step
  };
  Plan make_plan(const GemmShape& shape) const;
  const Plan& plan_for(const GemmShape& shape);
  // At least one; the fastest by the estimate of the heuristics first.
  std::vector<GemmAlgorithm> suggestions(const Plan& plan, const GemmShape& shape,
                                         int at_most) const;
  // Of the same family as plan.algorithm, best estimates first; all pass the library's check.
  std::vector<GemmAlgorithm> explored(const Plan& plan, const GemmShape& shape) const;
  // Suggestions, then the explored ones.
  std::vector<GemmAlgorithm> all_candidates(const Plan& plan, const GemmShape& shape) const;
  // Whether the algorithm supports this product within the workspace; fills `needs`.
  bool runs(const Plan& plan, const GemmAlgorithm& algorithm,
            cublasLtMatmulHeuristicResult_t& needs) const;
  void launch(const Plan& plan, const GemmShape& shape, const GemmAlgorithm& algorithm, void* d,
              const void* a, const void* b, const void* c, const float* alpha);

  void apply_tuning(Plan& plan, const GemmShape& shape) const;
  GemmAlgorithm known_algorithm(const Plan& plan, const std::string& name,
                                const std::string& text) const;
  void decide(int64_t runs);
  GemmAlgorithm fastest(const Plan& plan, const GemmShape& shape, int64_t runs);
  void fill(void* device, int64_t bytes, const std::vector<uint16_t>& values) const;
  // Operand values for timing, bf16; made on first use.
  const std::vector<uint16_t>& normals();
  const std::vector<uint16_t>& levels();
  void say(const std::string& line) const;

  cudaStream_t stream_;
  std::shared_ptr<MemoryPool> pool_;
  Handle<cublasLtHandle_t, cublasLtDestroy> handle_;
  Handle<char*, cudaFree> own_workspace_;
  char* workspace_ = nullptr;
  float* constants_ = nullptr;  // on the device, behind the workspace: 0, 1
  std::map<GemmShape, Plan> plans_;

  std::optional<engine::GemmTuning> tuning_;  // timed choices are added to its `known`
  std::vector<uint16_t> normals_, levels_;
  int64_t timed_ = 0, searched_ = 0, improved_ = 0;  // products, since tune()
  double timing_s_ = 0;
};

}  // namespace bbb::cuda
