// LDLQ: rounds the weights of a linear to a fixed grid and feeds every error forward to the weights
// that are rounded after it. It minimises the error of the outputs, tr (w^ - w) H (w^ - w)^T, with
// H = sum x x^T over the input rows of the linear's site.
//
//   H + damp I = L D L^T           L unit lower triangular, over positions in ascending order of
//                                  diag H; damp: a share of the mean of diag H
//   for c = K' - 1 .. 0            positions, so from the largest diagonal down
//     t_c  = w_c + sum_{r > c} (w_r - w^_r) L_rc
//     w^_c = S e (q - z),  q = clamp(round(t_c / s) + z, 0, 2^b - 1)
//
// Chee et al., "QuIP: 2-bit quantization of large language models with guarantees", 2023, show that
// this gives what GPTQ gives (Frantar et al., "GPTQ: accurate post-training quantization for
// generative pre-trained transformers", 2022), which takes the Cholesky factor of H^-1; here
// nothing is inverted. The grid (S, e, z) of every group is found before and stays ("static
// groups"), so the order of rounding needs no order of storage.
//
// On the host: K'^3 / 3 operations in double for the factor, N K'^2 in float for the rounding. Both
// add in an order that does not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/cpu/thread_pool.h"
#include "models/layer_result.h"

namespace bbb::models {

inline constexpr double kHessianDamping = 0.01;  // GPTQ's

// Host memory of a factor of K' positions while it is made: the Hessian, a copy in double, L.
constexpr int64_t hessian_factor_bytes(int64_t k) { return 16 * k * k; }

struct HessianFactor {
  std::vector<int32_t> order;  // (K'): the position of each row and column of L
  std::vector<float> unit;     // (K', K'): L, row-major; nothing above the diagonal is read
  std::vector<double> d;       // (K'): the diagonal of D
};

// hessian (K', K'), symmetric. A position whose input is always 0 has no influence on the others.
// Throws, naming `where`, if it holds a value that is not finite.
HessianFactor factorize_hessian(const std::vector<float>& hessian, int64_t k, double damping,
                                engine::ThreadPool& pool, const std::string& where);

// Rounds the masters of `start`, in a format of fewer than 16 bits, and adds their stored form to
// it; the grid is that of rounding to nearest, with start's ratios. Returns the error, the trace
// above with H + damp I.
double round_with_feedback(LinearResult& start, const HessianFactor& factor,
                           engine::ThreadPool& pool);

}  // namespace bbb::models
