// Causal attention with grouped queries. q, o (B, T, H, d); k, v (B, S, K, d); lse (B, H, T).
//
//     P = exp(scale q k^T - lse) on the visible keys;  o = P v;  scale = 1 / sqrt(d)
//     dv = P^T do;  dP = do v^T;  dS = P (dP - rowsum(do o));  dq = scale dS k;  dk = scale dS^T q
//
// A task takes kQueryBlock queries of one head and the strip of keys that any of them sees, so a
// thread holds kQueryBlock x S scores, never T x T. BLAS computes the products on the strip. Scores
// that causality or the window hides are set to zero after the exponential.
//
// Backward: a task owns one kv-head of one batch row, with its dk and dv. It goes through the
// group's query heads and their blocks in order, so every sum has one order. Gradients of rotated q
// and k are rotated back at the end, in place.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "engine/cpu/blas.h"
#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/vector_math.h"

namespace bbb::engine {
namespace {

constexpr int64_t kQueryBlock = 64;

// Keys [begin, end) that a query at `position` sees.
struct Keys {
  int64_t begin, end;
};

Keys visible(int64_t position, const AttentionSpec& spec) {
  return {spec.window > 0 ? std::max<int64_t>(0, position + 1 - spec.window) : 0, position + 1};
}

// Scratch of one thread, kept between tasks because a strip of scores is large.
template <typename T>
T* scratch(std::vector<T>& buffer, int64_t size) {
  if (buffer.size() < static_cast<size_t>(size)) buffer.resize(static_cast<size_t>(size));
  return buffer.data();
}

// Attention of `rows` queries q (row stride ldq) to one head of k and v (row stride ldk). Row r is
// at position first + r * stride: stride 1 for a block of queries, 0 for the heads of a group at
// one position. lse: null, or one value per row.
template <typename T>
void attend(T* o, T* lse, const T* q, int64_t ldq, const T* k, const T* v, int64_t ldk,
            int64_t rows, int64_t d, int64_t first, int64_t stride, const AttentionSpec& spec) {
  static thread_local std::vector<T> strip;
  const int64_t low = visible(first, spec).begin;
  const int64_t width = visible(first + (rows - 1) * stride, spec).end - low;
  const T scale = static_cast<T>(1.0 / std::sqrt(static_cast<double>(d)));
  T* scores = scratch(strip, rows * width);
  blas_gemm(CblasNoTrans, CblasTrans, rows, width, d, scale, q, ldq, k + low * ldk, ldk, T{0},
            scores, width);
  for (int64_t r = 0; r < rows; ++r) {
    const Keys keys = visible(first + r * stride, spec);
    T* row = scores + r * width;
    T *begin = row + (keys.begin - low), *end = row + (keys.end - low);
    const int64_t n = end - begin;
    const T most = lane_max(begin, n);
    for (int64_t i = 0; i < n; ++i) begin[i] = vector_exp(begin[i] - most);
    const T total = lane_sum<T>(n, [=](int64_t i) { return begin[i]; });
    const T inverse = T{1} / total;
    for (int64_t i = 0; i < n; ++i) begin[i] *= inverse;
    std::fill(row, begin, T{0});
    std::fill(end, row + width, T{0});
    if (lse != nullptr) lse[r] = most + std::log(total);
  }
  blas_gemm(CblasNoTrans, CblasNoTrans, rows, d, width, T{1}, scores, width, v + low * ldk, ldk,
            T{0}, o, ldq);
}

// Of every sequence, positions start .. start + time - 1 must be in its cache.
void check_positions(const Tensor& start, int64_t time, int64_t capacity) {
  for (int64_t b = 0; b < start.numel(); ++b) {
    const int64_t first = start.data<int32_t>()[b];
    BBB_CHECK(first >= 0 && first + time <= capacity, "positions ", first, " to ", first + time - 1,
              " of a key-value cache of ", capacity);
  }
}

}  // namespace

template <typename T>
void CpuBackend<T>::do_attention(const Tensor& o, const Tensor& lse, const Tensor& q,
                                 const Tensor& k, const Tensor& v, const AttentionSpec& spec,
                                 const Tensor&) {
  const int64_t batch = q.dim(0), time = q.dim(1), heads = q.dim(2), d = q.dim(3);
  const int64_t kv_heads = k.dim(2), group = heads / kv_heads, ldq = heads * d, ldk = kv_heads * d;
  const int64_t blocks = (time + kQueryBlock - 1) / kQueryBlock;
  parallel_for(batch * heads * blocks, 1, [&](int64_t task, int64_t) {
    // The longest strips first, so that the threads finish together.
    const int64_t t = (blocks - 1 - task / (batch * heads)) * kQueryBlock;
    const int64_t h = task % heads, b = task / heads % batch;
    const int64_t at_q = (b * time + t) * ldq + h * d, at_k = b * time * ldk + h / group * d;
    attend(data(o) + at_q, data(lse) + (b * heads + h) * time + t, data(q) + at_q, ldq,
           data(k) + at_k, data(v) + at_k, ldk, std::min(kQueryBlock, time - t), d, t, 1, spec);
  });
}

template <typename T>
void CpuBackend<T>::do_attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                          const Tensor& dout, const Tensor& q, const Tensor& k,
                                          const Tensor& v, const Tensor& o, const Tensor& lse,
                                          const Tensor& inv_freq, const AttentionSpec& spec,
                                          const Tensor&) {
  const int64_t batch = q.dim(0), time = q.dim(1), heads = q.dim(2), d = q.dim(3);
  const int64_t kv_heads = k.dim(2), group = heads / kv_heads, ldq = heads * d, ldk = kv_heads * d;
  const T scale = static_cast<T>(1.0 / std::sqrt(static_cast<double>(d)));
  do_zero(dk);
  do_zero(dv);
  parallel_for(batch * kv_heads, 1, [&](int64_t task, int64_t) {
    static thread_local std::vector<T> p_strip, ds_strip;
    const int64_t b = task / kv_heads, kv = task % kv_heads;
    const int64_t at_k = b * time * ldk + kv * d;
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
      for (int64_t t = 0; t < time; t += kQueryBlock) {
        const int64_t rows = std::min(kQueryBlock, time - t), at_q = (b * time + t) * ldq + h * d;
        const int64_t low = visible(t, spec).begin, width = t + rows - low;
        const T *q_block = data(q) + at_q, *do_block = data(dout) + at_q;
        const T *o_block = data(o) + at_q, *lse_row = data(lse) + (b * heads + h) * time + t;
        const T *k_strip = data(k) + at_k + low * ldk, *v_strip = data(v) + at_k + low * ldk;
        T* p = scratch(p_strip, rows * width);    // (rows, width)
        T* ds = scratch(ds_strip, rows * width);  // (rows, width): dP, then dS

        blas_gemm(CblasNoTrans, CblasTrans, rows, width, d, scale, q_block, ldq, k_strip, ldk, T{0},
                  p, width);
        blas_gemm(CblasNoTrans, CblasTrans, rows, width, d, T{1}, do_block, ldq, v_strip, ldk, T{0},
                  ds, width);
        for (int64_t r = 0; r < rows; ++r) {
          const Keys keys = visible(t + r, spec);
          const int64_t from = keys.begin - low, to = keys.end - low;
          const T *g = do_block + r * ldq, *out = o_block + r * ldq;
          const T delta = lane_sum<T>(d, [=](int64_t i) { return g[i] * out[i]; });
          const T row_lse = lse_row[r];
          T *p_row = p + r * width, *ds_row = ds + r * width;
          std::fill(p_row, p_row + from, T{0});
          std::fill(ds_row, ds_row + from, T{0});
          for (int64_t i = from; i < to; ++i) {
            const T weight = vector_exp(p_row[i] - row_lse);
            ds_row[i] = weight * (ds_row[i] - delta);
            p_row[i] = weight;
          }
          std::fill(p_row + to, p_row + width, T{0});
          std::fill(ds_row + to, ds_row + width, T{0});
        }
        blas_gemm(CblasTrans, CblasNoTrans, width, d, rows, T{1}, p, width, do_block, ldq, T{1},
                  data(dv) + at_k + low * ldk, ldk);
        blas_gemm(CblasTrans, CblasNoTrans, width, d, rows, scale, ds, width, q_block, ldq, T{1},
                  data(dk) + at_k + low * ldk, ldk);
        blas_gemm(CblasNoTrans, CblasNoTrans, rows, d, width, scale, ds, width, k_strip, ldk, T{0},
                  data(dq) + at_q, ldq);
      }
  });
  if (!inv_freq.defined()) return;
  // dk is complete only here. The sums are stored in full precision, so rotating them in place does
  // not round twice.
  for (const Tensor* gradient : {&dq, &dk})
    do_rope(*gradient, inv_freq, Tensor(), Rotation::Inverse, spec.rope_factor);
}

template <typename T>
void CpuBackend<T>::do_append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                                 const Tensor& v, const Tensor& start) {
  const int64_t batch = k.dim(0), time = k.dim(1), capacity = k_cache.dim(1);
  const int64_t width = k.dim(2) * k.dim(3);
  const int32_t* first = start.data<int32_t>();
  check_positions(start, time, capacity);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t to = (b * capacity + first[b]) * width, from = b * time * width;
    std::copy_n(data(k) + from, time * width, data(k_cache) + to);
    std::copy_n(data(v) + from, time * width, data(v_cache) + to);
  }
}

template <typename T>
void CpuBackend<T>::do_attention_cached(const Tensor& o, const Tensor& q, const Tensor& k_cache,
                                        const Tensor& v_cache, const Tensor& start,
                                        const AttentionSpec& spec, const Tensor&) {
  const int64_t batch = q.dim(0), time = q.dim(1), heads = q.dim(2), d = q.dim(3);
  const int64_t capacity = k_cache.dim(1), kv_heads = k_cache.dim(2), group = heads / kv_heads;
  const int64_t ldq = heads * d, ldk = kv_heads * d;
  const int32_t* first = start.data<int32_t>();
  check_positions(start, time, capacity);
  const auto cache = [&](const Tensor& t, int64_t b, int64_t kv) {
    return data(t) + b * capacity * ldk + kv * d;
  };
  if (time == 1) {  // decoding: the heads of a group are the rows of one product
    // For fewer scores in total, the pool costs more than the work.
    const int64_t tasks = batch * kv_heads;
    const int64_t keys = std::accumulate(first, first + batch, batch);
    const int64_t grain = keys * heads < 512 ? tasks : 1;
    parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / kv_heads, kv = task % kv_heads, at = task * group * d;
        attend<T>(data(o) + at, nullptr, data(q) + at, d, cache(k_cache, b, kv),
                  cache(v_cache, b, kv), ldk, group, d, first[b], 0, spec);
      }
    });
    return;
  }
  const int64_t blocks = (time + kQueryBlock - 1) / kQueryBlock;
  parallel_for(batch * heads * blocks, 1, [&](int64_t task, int64_t) {
    const int64_t t = (blocks - 1 - task / (batch * heads)) * kQueryBlock;
    const int64_t h = task % heads, b = task / heads % batch;
    const int64_t at = (b * time + t) * ldq + h * d;
    attend<T>(data(o) + at, nullptr, data(q) + at, ldq, cache(k_cache, b, h / group),
              cache(v_cache, b, h / group), ldk, std::min(kQueryBlock, time - t), d, first[b] + t,
              1, spec);
  });
}

BBB_CPU_INSTANTIATE(attention);
BBB_CPU_INSTANTIATE(attention_backward);
BBB_CPU_INSTANTIATE(append_kv);
BBB_CPU_INSTANTIATE(attention_cached);

}  // namespace bbb::engine
