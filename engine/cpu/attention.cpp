// Causal attention with grouped queries. q, o (B, T, H, d); k, v (B, S, K, d); lse (B, H, T).
//
//     P = exp(scale q k^T - lse) on the visible keys;  o = P v;  scale = 1 / sqrt(d)
//     dv = P^T do;  dP = do v^T;  dS = P (dP - rowsum(do o));  dq = scale dS k;  dk = scale dS^T q
//
// A task takes kQueryBlock queries of one head and the strip of keys that any of them sees, so a
// thread holds kQueryBlock x S scores, never T x T. BLAS computes the products on the strip. Scores
// that causality, the window or the first key hides are set to zero after the exponential.
//
// Backward: a task owns one kv-head of one batch row, with its dk and dv. It goes through the
// group's query heads and their blocks in order, so every sum has one order. Gradients of rotated q
// and k are rotated back at the end, in place.
//
// Decoding, one query a sequence: a task takes kKeyChunk keys and all heads, and reads keys and
// values in the order of memory. It leaves, for each head, the largest score m, l = sum exp(score -
// m) and o = sum exp(score - m) v. The chunks c of a sequence are then joined in order:
//
//     m = max m_c;  o = sum_c exp(m_c - m) o_c / sum_c exp(m_c - m) l_c
//
// A quantized cache (quant::KvFormat): appending quantizes the rows; a task of attention_cached
// dequantizes the keys and values that it needs.
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/cpu/blas.h"
#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/pack.h"
#include "engine/cpu/row_ops.h"
#include "engine/cpu/vector_math.h"
#include "quant/grid.h"
#include "quant/pack.h"

namespace bbb::engine {
namespace {

constexpr int64_t kQueryBlock = 64, kKeyChunk = 64;

// Keys [begin, end) that a query at `position` sees.
struct Keys {
  int64_t begin, end;
};

// first_key: of each position; null: 0.
Keys visible(int64_t position, const AttentionSpec& spec, const int32_t* first_key = nullptr) {
  const int64_t first = first_key == nullptr ? 0 : first_key[position];
  return {spec.window > 0 ? std::max(first, position + 1 - spec.window) : first, position + 1};
}

// The first keys of sequence b of T positions, null if there are none. Throws unless they are in
// order.
const int32_t* first_keys(const AttentionSpec& spec, int64_t b, int64_t time) {
  if (!spec.first_key.defined()) return nullptr;
  const int32_t* const keys = spec.first_key.data<int32_t>() + b * time;
  int32_t before = 0;
  for (int64_t t = 0; t < time; before = keys[t++])
    BBB_CHECK(keys[t] >= before && keys[t] <= t, "attention: first_key[", b, ", ", t, "] is ",
              keys[t], " behind ", before);
  return keys;
}

// Attention of `rows` queries q (row stride ldq) to one head of k and v (row stride ldk), which
// start at the first visible key. Row r is at position first + r. lse: null, or one value per row.
template <typename T>
void attend(T* o, T* lse, const T* q, int64_t ldq, const T* k, const T* v, int64_t ldk,
            int64_t rows, int64_t d, int64_t first, const AttentionSpec& spec,
            const int32_t* first_key = nullptr) {
  static thread_local std::vector<T> strip;
  const int64_t low = visible(first, spec, first_key).begin;
  const int64_t width = visible(first + rows - 1, spec).end - low;
  const T scale = static_cast<T>(1.0 / std::sqrt(static_cast<double>(d)));
  T* scores = scratch(strip, rows * width);
  blas_gemm(CblasNoTrans, CblasTrans, rows, width, d, scale, q, ldq, k, ldk, T{0}, scores, width);
  for (int64_t r = 0; r < rows; ++r) {
    const Keys keys = visible(first + r, spec, first_key);
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

// Keys or values of a chunk: that of head h and key i is at data + h * head_stride + i *
// key_stride.
template <typename T>
struct ChunkRows {
  const T* data;
  int64_t head_stride, key_stride;

  const T* row(int64_t head, int64_t key) const {
    return data + head * head_stride + key * key_stride;
  }
};

// o (d) += sum_i p[i] v[i] of kKeys rows v, `stride` elements apart.
template <int kKeys, typename T>
void add_values(T* o, const T* p, const T* v, int64_t stride, int64_t d) {
  using P = PackOf<T>;
  int64_t c = 0;
  for (; d - c >= P::kLanes; c += P::kLanes) {
    typename P::Pack sum = P::load(o + c);
    for (int i = 0; i < kKeys; ++i) sum += p[i] * P::load(v + i * stride + c);
    P::store(o + c, sum);
  }
  for (; c < d; ++c)
    for (int i = 0; i < kKeys; ++i) o[c] += p[i] * v[i * stride + c];
}

// What a chunk leaves: o (H, d), then m (H) and l (H).
template <typename T>
void attend_chunk(T* out, const T* q, const ChunkRows<T>& k, const ChunkRows<T>& v, int64_t keys,
                  int64_t kv_heads, int64_t group, int64_t d) {
  constexpr int kTogether = 4;                           // keys for which o is loaded once
  constexpr int64_t kAhead = 8, kLine = 64 / sizeof(T);  // keys to a prefetch; elements of a line
  static thread_local std::vector<T> strip;
  const T scale = static_cast<T>(1.0 / std::sqrt(static_cast<double>(d)));
  const int64_t heads = kv_heads * group;
  T* const scores = scratch(strip, heads * kKeyChunk);  // (H, kKeyChunk)
  for (int64_t i = 0; i < keys; ++i) {
    // From memory, prefetches nearly double the speed. The values are read after all keys.
    for (int64_t at = 0; at < k.key_stride; at += kLine) {
      __builtin_prefetch(k.row(0, i + kAhead) + at);
      __builtin_prefetch(v.row(0, i) + at);
    }
    for (int64_t kv = 0; kv < kv_heads; ++kv)
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        scores[h * kKeyChunk + i] = scale * pack_dot(q + h * d, k.row(kv, i), d);
  }
  T *const most = out + heads * d, *const total = most + heads;
  for (int64_t h = 0; h < heads; ++h) {
    T* const row = scores + h * kKeyChunk;
    const T largest = lane_max(row, keys);
    for (int64_t i = 0; i < keys; ++i) row[i] = vector_exp(row[i] - largest);
    most[h] = largest;
    total[h] = lane_sum<T>(keys, [=](int64_t i) { return row[i]; });
  }
  std::fill_n(out, heads * d, T{0});
  for (int64_t i = 0; i < keys;) {
    const bool several = keys - i >= kTogether;
    for (int64_t kv = 0; kv < kv_heads; ++kv)
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        const T* const p = scores + h * kKeyChunk + i;
        if (several)
          add_values<kTogether>(out + h * d, p, v.row(kv, i), v.key_stride, d);
        else
          add_values<1>(out + h * d, p, v.row(kv, i), v.key_stride, d);
      }
    i += several ? kTogether : 1;
  }
}

// Joins chunks of attend_chunk(), `stride` elements apart, into o (H, d).
template <typename T>
void join_chunks(T* o, const T* chunks, int64_t stride, int64_t count, int64_t heads, int64_t d) {
  std::fill_n(o, heads * d, T{0});
  for (int64_t h = 0; h < heads; ++h) {
    const T *const most = chunks + heads * d + h, *const totals = most + heads;
    T largest = most[0], total = 0;
    for (int64_t c = 1; c < count; ++c) largest = std::max(largest, most[c * stride]);
    for (int64_t c = 0; c < count; ++c)
      total += vector_exp(most[c * stride] - largest) * totals[c * stride];
    for (int64_t c = 0; c < count; ++c) {
      const T weight = vector_exp(most[c * stride] - largest) / total;
      const T* const part = chunks + c * stride + h * d;
      for (int64_t i = 0; i < d; ++i) o[h * d + i] += weight * part[i];
    }
  }
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

  // to (keys, d): one head of all these positions.
  template <typename T>
  void dequantize(T* to, int64_t head, Keys keys) const {
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
    const int32_t* const first_key = first_keys(spec, b, time);
    const int64_t at_k = (b * time + visible(t, spec, first_key).begin) * ldk + h / group * d;
    attend(data(o) + at_q, data(lse) + (b * heads + h) * time + t, data(q) + at_q, ldq,
           data(k) + at_k, data(v) + at_k, ldk, std::min(kQueryBlock, time - t), d, t, spec,
           first_key);
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
    const int32_t* const first_key = first_keys(spec, b, time);
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
      for (int64_t t = 0; t < time; t += kQueryBlock) {
        const int64_t rows = std::min(kQueryBlock, time - t), at_q = (b * time + t) * ldq + h * d;
        const int64_t low = visible(t, spec, first_key).begin, width = t + rows - low;
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
          const Keys keys = visible(t + r, spec, first_key);
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
  const int64_t half = d / 2, q_width = q.defined() ? q.dim(2) * d : 0;
  parallel_for(batch * time, row_grain(2 * width + q_width), [&](int64_t begin, int64_t end) {
    static thread_local std::vector<T> buffer;
    T* const cosine = scratch(buffer, d + width);
    T *const sine = cosine + half, *const rotated = cosine + d;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / time, position = first[b] + row % time;
      const T *key = data(k) + row * width, *const value = data(v) + row * width;
      if (inv_freq.defined()) {
        rope_angles(cosine, sine, position, inv_freq.data<float>(), half, rope_factor, 1.0);
        rotate_row(data(q) + row * q_width, cosine, sine, q_width / d, half);
        std::copy_n(key, width, rotated);
        key = rotated;
        rotate_row(rotated, cosine, sine, heads, half);
      }
      if (format.quantized()) {
        for (int64_t h = 0; h < heads; ++h) {
          QuantizedRows(k_cache, b, format, d).quantize(position, h, key + h * d);
          QuantizedRows(v_cache, b, format, d).quantize(position, h, value + h * d);
        }
      } else {
        const int64_t to = (b * capacity + position) * width;
        std::copy_n(key, width, data(k_cache) + to);
        std::copy_n(value, width, data(v_cache) + to);
      }
    }
  });
}

template <typename T>
void CpuBackend<T>::attend_step(const Tensor& o, const Tensor& q, const Tensor& k_cache,
                                const Tensor& v_cache, const int32_t* start,
                                const AttentionSpec& spec, KvFormat format) {
  const int64_t batch = q.dim(0), heads = q.dim(2), d = q.dim(3);
  const int64_t capacity = k_cache.dim(1), kv_heads = k_cache.dim(2), width = kv_heads * d;
  std::vector<int64_t> chunks = {0};  // before each sequence
  for (int64_t b = 0; b < batch; ++b) {
    const Keys keys = visible(start[b], spec);
    chunks.push_back(chunks.back() + (keys.end - keys.begin + kKeyChunk - 1) / kKeyChunk);
  }
  const int64_t stride = heads * (d + 2);
  static thread_local std::vector<T> buffer;
  T* const parts = scratch(buffer, chunks.back() * stride);
  parallel_for(chunks.back(), 1, [&](int64_t chunk, int64_t) {
    const int64_t b = std::ranges::upper_bound(chunks, chunk) - chunks.begin() - 1;
    const Keys all = visible(start[b], spec);
    const int64_t first = all.begin + (chunk - chunks[static_cast<size_t>(b)]) * kKeyChunk;
    const Keys keys{first, std::min(all.end, first + kKeyChunk)};
    const auto rows_of = [&](const Tensor& cache, std::vector<T>& buffer) -> ChunkRows<T> {
      if (!format.quantized()) return {data(cache) + (b * capacity + keys.begin) * width, d, width};
      const int64_t head_stride = (keys.end - keys.begin) * d;
      const QuantizedRows rows(cache, b, format, d);
      T* const out = scratch(buffer, kv_heads * head_stride);
      for (int64_t h = 0; h < kv_heads; ++h) rows.dequantize(out + h * head_stride, h, keys);
      return {out, head_stride, d};
    };
    static thread_local std::vector<T> k_buffer, v_buffer;
    attend_chunk(parts + chunk * stride, data(q) + b * heads * d, rows_of(k_cache, k_buffer),
                 rows_of(v_cache, v_buffer), keys.end - keys.begin, kv_heads, heads / kv_heads, d);
  });
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = chunks[static_cast<size_t>(b)];
    join_chunks(data(o) + b * heads * d, parts + first * stride, stride,
                chunks[static_cast<size_t>(b + 1)] - first, heads, d);
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
  if (time == 1) return attend_step(o, q, k_cache, v_cache, first, spec, format);
  const int64_t blocks = (time + kQueryBlock - 1) / kQueryBlock;
  parallel_for(batch * heads * blocks, 1, [&](int64_t task, int64_t) {
    const int64_t t = (blocks - 1 - task / (batch * heads)) * kQueryBlock;
    const int64_t h = task % heads, kv = h / group, b = task / heads % batch;
    const int64_t rows = std::min(kQueryBlock, time - t), position = first[b] + t;
    const int64_t at = (b * time + t) * ldq + h * d;
    const Keys keys{visible(position, spec).begin, position + rows};
    const T *k_rows, *v_rows;
    int64_t ld = ldk;
    if (format.quantized()) {
      static thread_local std::vector<T> k_buffer, v_buffer;
      T* const k_out = scratch(k_buffer, (keys.end - keys.begin) * d);
      T* const v_out = scratch(v_buffer, (keys.end - keys.begin) * d);
      QuantizedRows(k_cache, b, format, d).dequantize(k_out, kv, keys);
      QuantizedRows(v_cache, b, format, d).dequantize(v_out, kv, keys);
      k_rows = k_out;
      v_rows = v_out;
      ld = d;
    } else {
      const int64_t from = (b * capacity + keys.begin) * ldk + kv * d;
      k_rows = data(k_cache) + from;
      v_rows = data(v_cache) + from;
    }
    attend<T>(data(o) + at, nullptr, data(q) + at, ldq, k_rows, v_rows, ld, rows, d, position,
              spec);
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
