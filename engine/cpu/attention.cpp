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
//
// A quantized cache (quant::KvFormat): appending quantizes the rows; a task of attention_cached
// dequantizes the keys and values that it needs.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "engine/cpu/blas.h"
#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/vector_math.h"
#include "quant/grid.h"
#include "quant/pack.h"

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

// Attention of `rows` queries q (row stride ldq) to one head of k and v (row stride ldk), which
// start at the first visible key. Row r is at position first + r * stride: stride 1 for a block of
// queries, 0 for the heads of a group at one position. lse: null, or one value per row.
template <typename T>
void attend(T* o, T* lse, const T* q, int64_t ldq, const T* k, const T* v, int64_t ldk,
            int64_t rows, int64_t d, int64_t first, int64_t stride, const AttentionSpec& spec) {
  static thread_local std::vector<T> strip;
  const int64_t low = visible(first, spec).begin;
  const int64_t width = visible(first + (rows - 1) * stride, spec).end - low;
  const T scale = static_cast<T>(1.0 / std::sqrt(static_cast<double>(d)));
  T* scores = scratch(strip, rows * width);
  blas_gemm(CblasNoTrans, CblasTrans, rows, width, d, scale, q, ldq, k, ldk, T{0}, scores, width);
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
  blas_gemm(CblasNoTrans, CblasNoTrans, rows, d, width, T{1}, scores, width, v, ldk, T{0}, o, ldq);
}

// Of every sequence, positions start .. start + time - 1 must be in its cache.
void check_positions(const Tensor& start, int64_t time, int64_t capacity) {
  for (int64_t b = 0; b < start.numel(); ++b) {
    const int64_t first = start.data<int32_t>()[b];
    BBB_CHECK(first >= 0 && first + time <= capacity, "positions ", first, " to ", first + time - 1,
              " of a key-value cache of ", capacity);
  }
}

// (q - z) e of a group. Written so that the compiler vectorizes it.
template <int kBits, typename T>
void dequantize_group(T* to, const uint8_t* code, uint8_t z, T e) {
  for (int i = 0; i < KvFormat::kGroup; i += 8 / kBits)
    for (int j = 0; j < 8 / kBits; ++j) {
      const int q = code[i * kBits / 8] >> j * kBits & quant::max_code(kBits);
      to[i + j] = static_cast<T>(q - z) * e;
    }
}

// The codes and pairs of sequence b of a quantized cache of (Tmax, K, d) values.
struct QuantizedRows {
  QuantizedRows(const Tensor& cache, int64_t b, KvFormat cache_format, int64_t head_size)
      : format(cache_format), d(head_size), heads(cache.dim(2)) {
    const int64_t positions = cache.dim(1);
    codes = cache.data<uint8_t>() + b * positions * heads * format.head_bytes(d);
    pairs = codes + positions * heads * format.code_bytes(d);
  }

  template <typename T>
  void quantize(int64_t position, int64_t head, const T* x) const {
    uint8_t* code = codes + (position * heads + head) * format.code_bytes(d);
    uint8_t* pair = pairs + (position * heads + head) * KvFormat::pair_bytes(d);
    std::fill_n(pair, KvFormat::pair_bytes(d), uint8_t{0});
    for (int64_t g = 0; g < d; g += KvFormat::kGroup, x += KvFormat::kGroup, pair += 2) {
      quant::Range<T> range;
      for (int i = 0; i < KvFormat::kGroup; ++i) range.include(x[i]);
      const quant::GroupParams params = quant::group_params(range, T{1}, format.bits);
      const T step = quant::step_of(params.e, T{1});
      uint8_t q[KvFormat::kGroup];
      for (int i = 0; i < KvFormat::kGroup; ++i)
        q[i] = static_cast<uint8_t>(quant::code_of(x[i], step, params.z, format.bits));
      quant::pack_codes(code + g * format.bits / 8, q, KvFormat::kGroup, format.bits);
      pair[0] = params.e;
      pair[1] = params.z;
    }
  }

  // out (keys, d): one head of all these positions.
  template <typename T>
  const T* dequantize(std::vector<T>& buffer, int64_t head, Keys keys) const {
    T* const out = scratch(buffer, (keys.end - keys.begin) * d);
    T* to = out;
    for (int64_t position = keys.begin; position < keys.end; ++position) {
      const uint8_t* code = codes + (position * heads + head) * format.code_bytes(d);
      const uint8_t* pair = pairs + (position * heads + head) * KvFormat::pair_bytes(d);
      for (int64_t g = 0; g < d; g += KvFormat::kGroup, to += KvFormat::kGroup, pair += 2) {
        const T e = quant::e4m3_decode(pair[0]);
        if (format.bits == 8)
          dequantize_group<8>(to, code + g, pair[1], e);
        else
          dequantize_group<4>(to, code + g / 2, pair[1], e);
      }
    }
    return out;
  }

  KvFormat format;
  int64_t d, heads;
  uint8_t *codes, *pairs;
};

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
    const int64_t at_q = (b * time + t) * ldq + h * d;
    const int64_t at_k = (b * time + visible(t, spec).begin) * ldk + h / group * d;
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
                                 const Tensor& v, const Tensor& start, const Tensor& q,
                                 const Tensor& inv_freq, KvFormat format, double rope_factor) {
  const int64_t batch = k.dim(0), time = k.dim(1), heads = k.dim(2), d = k.dim(3);
  const int64_t capacity = k_cache.dim(1), width = heads * d;
  const int32_t* first = start.data<int32_t>();
  check_positions(start, time, capacity);
  Tensor rotated = k;
  if (inv_freq.defined()) {
    rotated = empty(k.shape(), act());
    do_copy(rotated, k);
    for (const Tensor& rows : {rotated, q})
      do_rope(rows, inv_freq, start, Rotation::Forward, rope_factor);
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (format.quantized()) {
      const QuantizedRows keys(k_cache, b, format, d), values(v_cache, b, format, d);
      parallel_for(time * heads, row_grain(d), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t position = first[b] + row / heads, from = b * time * width + row * d;
          keys.quantize(position, row % heads, data(rotated) + from);
          values.quantize(position, row % heads, data(v) + from);
        }
      });
    } else {
      const int64_t to = (b * capacity + first[b]) * width, from = b * time * width;
      std::copy_n(data(rotated) + from, time * width, data(k_cache) + to);
      std::copy_n(data(v) + from, time * width, data(v_cache) + to);
    }
  }
}

template <typename T>
void CpuBackend<T>::do_attention_cached(const Tensor& o, const Tensor& q, const Tensor& k_cache,
                                        const Tensor& v_cache, const Tensor& start,
                                        const AttentionSpec& spec, KvFormat format, const Tensor&) {
  const int64_t batch = q.dim(0), time = q.dim(1), heads = q.dim(2), d = q.dim(3);
  const int64_t capacity = k_cache.dim(1), kv_heads = k_cache.dim(2), group = heads / kv_heads;
  const int64_t ldq = heads * d, ldk = kv_heads * d;
  const int32_t* first = start.data<int32_t>();
  check_positions(start, time, capacity);
  // `rows` queries at `at` of o and q, of sequence b and kv-head kv, as attend() takes them.
  const auto attend_cache = [&](int64_t b, int64_t kv, int64_t at, int64_t row_stride, int64_t rows,
                                int64_t position, int64_t stride) {
    const Keys keys{visible(position, spec).begin, position + (rows - 1) * stride + 1};
    const T *k_rows, *v_rows;
    int64_t ld = ldk;
    if (format.quantized()) {
      static thread_local std::vector<T> k_buffer, v_buffer;
      k_rows = QuantizedRows(k_cache, b, format, d).dequantize(k_buffer, kv, keys);
      v_rows = QuantizedRows(v_cache, b, format, d).dequantize(v_buffer, kv, keys);
      ld = d;
    } else {
      const int64_t from = (b * capacity + keys.begin) * ldk + kv * d;
      k_rows = data(k_cache) + from;
      v_rows = data(v_cache) + from;
    }
    attend<T>(data(o) + at, nullptr, data(q) + at, row_stride, k_rows, v_rows, ld, rows, d,
              position, stride, spec);
  };
  if (time == 1) {  // decoding: the heads of a group are the rows of one product
    // For fewer scores in total, the pool costs more than the work.
    const int64_t tasks = batch * kv_heads;
    const int64_t keys = std::accumulate(first, first + batch, batch);
    const int64_t grain = keys * heads < 512 ? tasks : 1;
    parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        attend_cache(task / kv_heads, task % kv_heads, task * group * d, d, group,
                     first[task / kv_heads], 0);
    });
    return;
  }
  const int64_t blocks = (time + kQueryBlock - 1) / kQueryBlock;
  parallel_for(batch * heads * blocks, 1, [&](int64_t task, int64_t) {
    const int64_t t = (blocks - 1 - task / (batch * heads)) * kQueryBlock;
    const int64_t h = task % heads, b = task / heads % batch;
    attend_cache(b, h / group, (b * time + t) * ldq + h * d, ldq, std::min(kQueryBlock, time - t),
                 first[b] + t, 1);
  });
}

template <typename T>
void CpuBackend<T>::do_attention_step(const Tensor& o, const Tensor& q, const Tensor& k,
                                      const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                                      const Tensor& start, const Tensor& inv_freq,
                                      const AttentionSpec& spec, KvFormat format,
                                      const Tensor& scratch) {
  do_append_kv(k_cache, v_cache, k, v, start, q, inv_freq, format, spec.rope_factor);
  do_attention_cached(o, q, k_cache, v_cache, start, spec, format, scratch);
}

BBB_CPU_INSTANTIATE(attention);
BBB_CPU_INSTANTIATE(attention_backward);
BBB_CPU_INSTANTIATE(append_kv);
BBB_CPU_INSTANTIATE(attention_cached);
BBB_CPU_INSTANTIATE(attention_step);

}  // namespace bbb::engine
