// SwiGLU of one element and its gradients, for every kernel that computes them. The sum that a
// multiplication feeds is an explicit fmaf, so that all files give the same bits, whatever their
// contraction flags. (The product inside of expf is exact.)
#pragma once

#ifdef __CUDACC__
namespace bbb::cuda {

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// silu(gate) up
__device__ inline float swiglu_of(float gate, float up) { return gate * sigmoid(gate) * up; }

// Replaces gate and up by their gradients; dh is that of silu(gate) up.
__device__ inline void swiglu_gradients(float& gate, float& up, float dh) {
  const float s = sigmoid(gate);
  const float dup = dh * gate * s;
  gate = dh * up * s * fmaf(gate, 1.0f - s, 1.0f);
  up = dup;
}

}  // namespace bbb::cuda
#endif
