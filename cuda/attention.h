// Shared by the attention kernels: sizes, order of blocks, dispatch by head size.
//
// A head has d values, a multiple of 8 up to 256. The kernels are compiled for a few sizes D; a
// launch takes the smallest one that holds d. A row has d values in global memory and D values in
// shared memory and registers. Values past d are zeros: they change no product and are not written
// back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "quant/check.h"
#include "quant/hd.h"

namespace bbb::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kNoWindow = 1 << 30;  // also the limit of sizes and positions

// The window as the kernels test it: key j is visible to query i where (unsigned)(i - j) < window.
inline int window_of(int64_t window) {
  return window > 0 ? static_cast<int>(std::min<int64_t>(window, kNoWindow)) : kNoWindow;
}

inline int checked_int(int64_t n) {
  BBB_CHECK(n >= 0 && n < kNoWindow, "attention: a size of ", n, " is over 2^30");
  return static_cast<int>(n);
}

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The order of tiles x heads blocks. It keeps the streamed rows of `group` heads in the L2 cache;
// within a group the tiles of rank 0, the longest, start first. If all heads fit, they are one
// group, so that only short tiles are left for the end.
struct BlockOrder {
  int tiles = 0;
  int heads = 0;
  int group = 1;

  // Each head streams `rows` rows of two tensors.
  BlockOrder(int tile_count, int head_count, int rows, int d)
      : tiles(tile_count), heads(head_count) {
    constexpr int64_t kStreamedBytes = int64_t{16} << 20, kWholeBytes = int64_t{40} << 20;
    const int64_t head_bytes = std::max<int64_t>(1, int64_t{rows} * d * 4);
    group = heads * head_bytes <= kWholeBytes
                ? std::max(1, heads)
                : static_cast<int>(std::max<int64_t>(1, kStreamedBytes / head_bytes));
  }
  BBB_HD unsigned blocks() const {
    return static_cast<unsigned>(tiles) * static_cast<unsigned>(heads);
  }

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

// What hides keys from a query: order and the window, or also the first key that it sees.
enum class Mask { Window, Documents };

struct ForwardArgs {
  __nv_bfloat16* o;        // (B, T, H, d)
  float* lse;              // (B, H, T), or null
  const __nv_bfloat16* q;  // (B, T, H, d)
  const __nv_bfloat16* k;  // (B, Tmax, K, d)
  const __nv_bfloat16* v;  // (B, Tmax, K, d)
  const int* start;        // (B): position of query 0, on the device; null: 0
  int batch, t, t_max, heads, kv_heads, d;
  int window;                      // window_of()
  const int* first_key = nullptr;  // (B, T): the first key of each query; null: no Documents
};

// The sm_90a kernel. If start is null, t_max is t. sms: number of multiprocessors; queue: a
// word of scratch.
void attention_forward_hopper(cudaStream_t stream, const ForwardArgs& args, int64_t d, int sms,
                              unsigned* queue);

constexpr int kTermRows = 128;  // lse2, delta and rotations are padded to a multiple of this

struct BackwardArgs {
  __nv_bfloat16 *dq, *dk, *dv;
  float* partial;  // null, or (H / K, 2, B, T, K, d): dk and dv of one query head each
  const __nv_bfloat16 *q, *k, *v, *dout;
  const float* lse2;   // (B, H, t_pad): log2 sum exp; infinite from T on, so that p is 0 there
  const float* delta;  // (B, H, t_pad): rowsum(dout o); 0 from T on
  // (t_pad, d/2): rotates pairs (i, i + d/2) of dq and dk before they are rounded; or null.
  const float2* rotations;
  int batch, t, t_pad, heads, kv_heads, d;
  int heads_per_item;  // query heads that an item of keys sums over
  int window;
  // Documents: (2, B, t_pad): the first key that each query sees, then the last query that sees
  // each key. Neither falls from one row to the next; rows from T on repeat row T - 1. Else null.
  const int* ends;
};

// The sm_90a kernel. scratch: attention_backward_hopper_bytes(), which depends only on the sizes in
// args and on ds_bytes, the most bytes of ds that it may store. sms: number of multiprocessors.
int64_t attention_backward_hopper_bytes(const BackwardArgs& args, int64_t ds_bytes, int sms);
void attention_backward_hopper(cudaStream_t stream, const BackwardArgs& args, int64_t d,
                               int64_t ds_bytes, int sms, void* scratch);

// Query t of sequence b sees keys max(0, start[b] + t - window + 1) .. start[b] + t.
void attention_forward(cudaStream_t stream, const ForwardArgs& args);

constexpr int kChunk = 8;  // bf16 values in 16 bytes, the unit of a copy
constexpr int kLargestHead = 256;

inline bool has_head_size(int64_t d) { return d > 0 && d <= kLargestHead && d % kChunk == 0; }

// The head sizes of the Hopper kernels.
inline bool has_hopper_head_size(int64_t d) { return d == 64 || d == 96 || d == 128; }

// Calls f with the head size as a compile-time constant, for the Hopper kernels.
template <typename F>
void with_head_size(int64_t d, F f) {
  BBB_ASSERT(has_hopper_head_size(d));
  if (d == 64)
    f(std::integral_constant<int, 64>{});
  else if (d == 96)
    f(std::integral_constant<int, 96>{});
  else
    f(std::integral_constant<int, 128>{});
}

// Calls f with the smallest compiled size that holds d, for the generic kernels.
template <typename F>
void with_padded_head_size(int64_t d, F f) {
  BBB_ASSERT(has_head_size(d));
  if (d > 128 && d <= 192)
    f(std::integral_constant<int, 192>{});
  else if (d > 192)
    f(std::integral_constant<int, 256>{});
  else
    with_head_size(d <= 64 ? 64 : d <= 96 ? 96 : 128, f);
}

#ifdef __CUDACC__
// 1 / sqrt(d), the factor of the scores.
__device__ inline float score_scale(int d) { return 1.0f / sqrtf(static_cast<float>(d)); }
#endif

}  // namespace bbb::cuda
