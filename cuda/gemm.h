// GemmPlanner: cuBLASLt behind the three matrix products.
//
// A row-major (R, C) matrix is the column-major (C, R) one, so each product is written for its
// transposed output. Plans are kept per shape. Only algorithms that sum split-K partials in a fixed
// order are taken, so the same inputs give the same bytes. One workspace a stream, allocated
// once, serves every product on it and stays put for recorded graphs.
//
// The algorithm is the heuristics' first. While tuned, a large product instead takes the fastest
// of the heuristics' suggestions, timed when it is first met (gemm_tuning.cpp), and of the
// library's other kernels (gemm_search.cpp) if the run will spend long on it. A product met while
// the stream records cannot be timed there: its plan stays unsettled until settle_recorded().
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
#include "cuda/memory.h"
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
  int align_a = 0, align_b = 0, align_c = 0, align_d = 0;  // bytes, at most 16: found by run()

  auto operator<=>(const GemmShape&) const = default;
  double flops() const { return 2.0 * static_cast<double>(m) * static_cast<double>(n * k); }
};

// Names the product in GemmChoices; different shapes have different names.
std::string to_string(const GemmShape& shape);

using GemmAlgorithm = cublasLtMatmulAlgo_t;  // plain bytes that the library's version gives meaning

class GemmPlanner {
 public:
  // `pool` lends the memory that timing takes.
  GemmPlanner(cudaStream_t stream, std::shared_ptr<MemoryPool> pool);

  // `alpha` on the device, or nullptr for 1. `c` is read only where shape.accumulate; may be `d`.
  void run(GemmShape shape, void* d, const void* a, const void* b, const void* c,
           const float* alpha);

  // Products run on this stream, with this workspace of kGemmWorkspaceBytes, until the object dies.
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

  // What Backend::tune_gemms promises. Every plan is made anew.
  void tune(std::optional<engine::GemmTuning> tuning);
  bool tuned() const { return tuning_.has_value(); }
  // A recording has met products that are to be timed: record again after settle_recorded().
  bool has_unsettled() const;
  void settle_recorded();
  // All that a choice can be for this product, the heuristics' first in front.
  std::vector<std::string> candidates(const GemmShape& shape) const;

 private:
  struct Plan {
    Handle<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> product;
    Handle<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy> a, b, out;
    GemmAlgorithm algorithm{};
    bool settled = false;  // `algorithm` is the one that the product keeps
    int64_t met = 0;       // times, until it was settled: products of a recorded step
  };
  Plan make_plan(const GemmShape& shape) const;
  const Plan& plan_for(const GemmShape& shape);
  // At least one, in increasing time as the heuristics estimate it.
  std::vector<GemmAlgorithm> suggestions(const Plan& plan, const GemmShape& shape,
                                         int at_most) const;
  // Of the same family as plan.algorithm, best estimates first; all pass the library's check.
  std::vector<GemmAlgorithm> explored(const Plan& plan, const GemmShape& shape) const;
  // Suggestions, then the explored ones.
  std::vector<GemmAlgorithm> all_candidates(const Plan& plan, const GemmShape& shape) const;
  // Whether the algorithm serves this product within the workspace; fills `needs`.
  bool runs(const Plan& plan, const GemmAlgorithm& algorithm,
            cublasLtMatmulHeuristicResult_t& needs) const;
  void launch(const Plan& plan, const GemmShape& shape, const GemmAlgorithm& algorithm, void* d,
              const void* a, const void* b, const void* c, const float* alpha);

  void apply_tuning(Plan& plan, const GemmShape& shape) const;
  GemmAlgorithm known_algorithm(const Plan& plan, const std::string& name,
                                const std::string& text) const;
  void settle(int64_t runs);
  GemmAlgorithm fastest(const Plan& plan, const GemmShape& shape, int64_t runs);
  void fill(void* device, int64_t bytes, const std::vector<uint16_t>& values) const;
  // What operands are filled with, bf16; made when they are first asked for.
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

  std::optional<engine::GemmTuning> tuning_;  // its `known` grows by what is timed
  std::vector<uint16_t> normals_, levels_;
  int64_t timed_ = 0, searched_ = 0, improved_ = 0;  // products, since tune()
  double timing_s_ = 0;
};

}  // namespace bbb::cuda
