// How weights start behind LC (numerics.md section 8): random signs of u and v, codes by LDLQ.
//
//   T = H_N diag(v)^-1 W diag(u)^-1 H_K        what W^ should be
//   H = E[x' x'^T], x' = H_K (u o x)           from the second moments E[x x^T] of the site's input
//   H = C C^T, C upper triangular
//   vectors of 4 in ascending order:  q_b = the codeword nearest to
//       T_b + (sum over earlier vectors j of (T - W^)_j C_jb) C_bb^-1
// so the errors of earlier vectors are compensated, as in GPTQ. Without moments H is the identity:
// every vector takes its nearest codeword.
//
// u and the map are those of all linears of a site. v of a linear is a sign times the RMS of its
// transformed rows times the factor of least error on a sample of them; then u and all v of the
// site are scaled to equal L2 norm, which leaves their products alone.
#pragma once

#include "engine/cpu/thread_pool.h"
#include "models/layer_result.h"

namespace bbb::models {

struct LcStart {
  bool scalar_map = false;  // A = 1 / sigma; else a fixed orthonormal matrix without zeros, / sigma
  uint64_t seed = 0;        // of the signs
};

// Host memory of the factor of a site's K features while it is made, beside the moments: a copy of
// them in double.
constexpr int64_t lc_factor_bytes(int64_t k) { return 8 * k * k; }

// The first map (4, 5).
std::vector<float> lc_first_map(bool scalar);

// The stored results of a site's linears, whose weights (N, K) are `masters`. moments: E[x x^T]
// (K, K) times any factor, or empty.
std::vector<LinearResult> lc_site_start(const std::vector<const std::vector<float>*>& masters,
                                        const std::vector<quant::LinearFormat>& formats,
                                        std::vector<float> moments, const LcStart& how,
                                        engine::ThreadPool& pool);

// A layer whose linears are stored, from its full-precision weights. moments: of each site.
LayerResult lc_layer_start(const LlamaConfig& config, const LayerResult& original,
                           const std::vector<quant::LinearFormat>& formats,
                           std::array<std::vector<float>, kSites> moments, const LcStart& how);

// Latents with what trains beside them, from which a stage starts: of a layer that has them, of a
// stored one, or of plain weights, without moments.
//
// A latent starts where its original weight lies in the bin of its code, `original` or the plain
// weights given, or in the middle. If all started in the middle, the first steps, all of one size,
// would move them over their thresholds at the same time.
LayerResult lc_latents(const LlamaConfig& config, const LayerResult& from,
                       const std::vector<quant::LinearFormat>& formats, const LcStart& how,
                       const LayerResult* original = nullptr);

}  // namespace bbb::models
