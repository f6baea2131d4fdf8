// What the attention kernels share: sizes, the order of their blocks, the choice by head size.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "quant/check.h"

namespace bbb::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kNoWindow = 1 << 30;  // also the limit of a position

// The window as the kernels test it: key j is visible to query i where (unsigned)(i - j) < window.
inline int window_of(int64_t window) {
  return window > 0 ? static_cast<int>(std::min<int64_t>(window, kNoWindow)) : kNoWindow;
}

inline int checked_int(int64_t n) {
  BBB_CHECK(n >= 0 && n < kNoWindow, "attention: a size of ", n, " is over 2^30");
  return static_cast<int>(n);
}

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Blocks of tiles x heads in an order that keeps the streamed rows of `group` heads in the L2 cache
// and, within a group, starts the tiles of rank 0, the longest, first.
struct BlockOrder {
  int tiles = 0;
  int heads = 0;
  int group = 1;

  // Each head streams `rows` rows of two tensors.
  BlockOrder(int tile_count, int head_count, int rows, int d)
      : tiles(tile_count), heads(head_count) {
    constexpr int64_t kStreamedBytes = int64_t{16} << 20;
    const int64_t head_bytes = std::max<int64_t>(1, int64_t{rows} * d * 4);
    group =
        static_cast<int>(std::clamp<int64_t>(kStreamedBytes / head_bytes, 1, std::max(1, heads)));
  }
  unsigned blocks() const { return static_cast<unsigned>(tiles) * static_cast<unsigned>(heads); }

#ifdef __CUDACC__
  __device__ void find(int block, int& rank, int& head) const {
    const int first = block / (group * tiles) * group;
    const int size = min(group, heads - first);
    const int within = block - first * tiles;
    rank = within / size;
    head = first + within % size;
  }
#endif
};

struct ForwardArgs {
  __nv_bfloat16* o;        // (B, T, H, d)
  float* lse;              // (B, H, T), or null
  const __nv_bfloat16* q;  // (B, T, H, d)
  const __nv_bfloat16* k;  // (B, Tmax, K, d)
  const __nv_bfloat16* v;  // (B, Tmax, K, d)
  const int* start;        // position of query 0, on the device; null: 0
  int batch, t, t_max, heads, kv_heads;
  int window;  // window_of()
};

// Query t sees keys max(0, start + t - window + 1) .. start + t.
void attention_forward(cudaStream_t stream, const ForwardArgs& args, int64_t d);

// Calls f with the head size as a constant.
template <typename F>
void with_head_size(int64_t d, F f) {
  switch (d) {
    case 64:
      return f(std::integral_constant<int, 64>{});
    case 96:
      return f(std::integral_constant<int, 96>{});
    case 128:
      return f(std::integral_constant<int, 128>{});
    default:
      BBB_CHECK(false, "attention on the GPU takes head sizes 64, 96 and 128, not ", d);
  }
}

}  // namespace bbb::cuda
