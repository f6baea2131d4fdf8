// Losses over a row of V logits; a row is one task. With softmax(x)_v = e^(x_v - lse(x)):
//
//     cross_entropy  loss[m] = lse(logits) - logits[target];  dlogits = scale (softmax - onehot)
//     kl_divergence  loss[m] = sum p (log p - log q), p of the teacher, q of the logits;
//                    dlogits = scale (q - p)
//     jensen_shannon loss[m] = beta KL(p||r) + (1 - beta) KL(q||r), r = beta p + (1 - beta) q;
//                    dlogits = scale (1 - beta) q (log(q / r) - KL(q||r))
//
// A row without a target (-1) gives loss 0 and gradient 0. dlogits may be the logits themselves.
//
// Over chunks of the vocabulary, KL = E_p[t - s] - (lse(t) - lse(s)) with teacher logits t and
// student logits s. Where both agree this cancels no more than sum p (log p - log q): lse(t) -
// lse(s) is the difference of the maxima plus log(sum / sum), so the error of either term is an
// epsilon of |t - s| + 1. t - s itself has the error of the logits.
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/vector_math.h"

namespace bbb::engine {
namespace {

// The shift s in e^(x - s): finite even if all logits are -Inf.
template <typename T>
T shift_of(T max) {
  return std::isfinite(max) ? max : T{0};
}

// The factor from terms e^(x - from) to terms e^(x - to). Equal arguments avoid -Inf - -Inf.
template <typename T>
T rescaling(T from, T to) {
  return from == to ? T{1} : vector_exp(from - to);
}

// sum_i e^(x_i - max) and the maximum, of the elements so far.
template <typename T>
struct ExpSum {
  T max = -std::numeric_limits<T>::infinity();
  T sum = 0;

  T log() const { return shift_of(max) + std::log(sum); }

  void merge(const ExpSum& other) {
    const T top = std::max(max, other.max);
    sum = sum * rescaling(max, top) + other.sum * rescaling(other.max, top);
    max = top;
  }
};

template <typename T>
ExpSum<T> exp_sum(const T* x, int64_t n) {
  const T max = lane_max(x, n), shift = shift_of(max);
  return {max, lane_sum<T>(n, [=](int64_t i) { return vector_exp(x[i] - shift); })};
}

// Running values of a row for kl_divergence, as stored in its state.
template <typename T>
struct KlSums {
  ExpSum<T> student, teacher;
  T weighted = 0;  // sum e^(t - teacher.max) (t - s)

  void merge(const KlSums& other) {
    const T top = std::max(teacher.max, other.teacher.max);
    weighted = part(*this, top) + part(other, top);
    student.merge(other.student);
    teacher.merge(other.teacher);
  }

  T loss() const {
    const T lse_difference =
        (shift_of(teacher.max) - shift_of(student.max)) + std::log(teacher.sum / student.sum);
    return weighted / teacher.sum - lse_difference;
  }

 private:
  // Words whose probability underflows add nothing, even where the student's logit is -Inf.
  static T part(const KlSums& sums, T top) {
    const T factor = rescaling(sums.teacher.max, top);
    return factor == 0 ? T{0} : sums.weighted * factor;
  }
};
static_assert(sizeof(KlSums<float>) == Backend::kKlState * sizeof(float));

template <typename T>
KlSums<T> kl_sums(const T* student, const T* teacher, int64_t n) {
  KlSums<T> sums{exp_sum(student, n), exp_sum(teacher, n)};
  const T shift = shift_of(sums.teacher.max);
  sums.weighted = lane_sum<T>(n, [=](int64_t i) {
    const T weight = vector_exp(teacher[i] - shift), term = weight * (teacher[i] - student[i]);
    return weight == 0 ? T{0} : term;
  });
  return sums;
}

// Running values of a row for cross_entropy, as stored in its state.
template <typename T>
struct CrossEntropySums {
  ExpSum<T> all;
  T target_logit = -std::numeric_limits<T>::infinity();  // until its chunk is read
};
static_assert(sizeof(CrossEntropySums<float>) == Backend::kCrossEntropyState * sizeof(float));

// `target` is an index into x and may be outside [0, n).
template <typename T>
void cross_entropy_gradient(T* grad, const T* x, int64_t n, T lse, int64_t target, T factor) {
  for (int64_t i = 0; i < n; ++i) grad[i] = factor * vector_exp(x[i] - lse);
  if (target >= 0 && target < n) grad[target] -= factor;
}

template <typename T>
void kl_gradient(T* grad, const T* x, const T* y, int64_t n, T lse_q, T lse_p, T factor) {
  for (int64_t i = 0; i < n; ++i)
    grad[i] = factor * (vector_exp(x[i] - lse_q) - vector_exp(y[i] - lse_p));
}

// The sums over the words of a row that jensen_shannon needs.
template <typename T>
struct MixtureKl {
  T student = 0, teacher = 0;  // KL(q||r), KL(p||r)

  MixtureKl& operator+=(const MixtureKl& other) {
    student += other.student;
    teacher += other.teacher;
    return *this;
  }
};

// One row of jensen_shannon: x are logits of the student, y of the teacher.
template <typename T>
struct JensenShannonRow {
  T lse_q, lse_p, beta;

  struct Word {
    T q, log_q_r, p, log_p_r;  // log(q / r) and log(p / r), 0 where the probability is 0
  };
  // log_top is log(max(p, q) / r). With d = log q - log p it is -log(beta + (1 - beta) e^d) if
  // d <= 0, and -log(beta e^-d + (1 - beta)) otherwise. No term overflows, and all are 0 if p = q.
  Word word(T x, T y) const {
    const T log_q = x - lse_q, log_p = y - lse_p, d = log_q - log_p;
    const T q = vector_exp(log_q), p = vector_exp(log_p);
    const T log_top = -std::log1p((d > 0 ? beta : 1 - beta) * std::expm1(-std::abs(d)));
    return {q, q == 0 ? T{0} : log_top + std::min(d, T{0}),  //
            p, p == 0 ? T{0} : log_top - std::max(d, T{0})};
  }

  MixtureKl<T> sums(const T* x, const T* y, int64_t n) const {
    return lane_sum<MixtureKl<T>>(n, [=, this](int64_t i) {
      const Word w = word(x[i], y[i]);
      return MixtureKl<T>{w.q * w.log_q_r, w.p * w.log_p_r};
    });
  }

  T loss(const MixtureKl<T>& kl) const { return beta * kl.teacher + (1 - beta) * kl.student; }

  void gradient(T* grad, const T* x, const T* y, int64_t n, T student_kl, T factor) const {
    for (int64_t i = 0; i < n; ++i) {
      const Word w = word(x[i], y[i]);
      grad[i] = factor * (1 - beta) * w.q * (w.log_q_r - student_kl);
    }
  }
};

}  // namespace

template <typename T>
void CpuBackend<T>::do_cross_entropy(const Tensor& loss, const Tensor& dlogits,
                                     const Tensor& logits, const Tensor& targets, double scale) {
  const int64_t rows = logits.dim(0), v = logits.dim(1);
  const T factor = static_cast<T>(scale);
  parallel_for(rows, row_grain(v), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* x = data(logits) + m * v;
      T* grad = dlogits.defined() ? data(dlogits) + m * v : nullptr;
      const int32_t target = targets.data<int32_t>()[m];
      BBB_CHECK(target < v, "cross_entropy: target ", target, " is not below ", v);
      if (target < 0) {
        data(loss)[m] = 0;
        if (grad != nullptr) std::fill_n(grad, v, T{0});
        continue;
      }
      const T lse = exp_sum(x, v).log();
      data(loss)[m] = lse - x[target];
      if (grad != nullptr) cross_entropy_gradient(grad, x, v, lse, target, factor);
    }
  });
}

template <typename T>
void CpuBackend<T>::do_kl_divergence(const Tensor& loss, const Tensor& dlogits,
                                     const Tensor& logits, const Tensor& teacher,
                                     const Tensor& targets, double scale) {
  const int64_t rows = logits.dim(0), v = logits.dim(1);
  const T factor = static_cast<T>(scale);
  parallel_for(rows, row_grain(v), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T *x = data(logits) + m * v, *y = data(teacher) + m * v;
      T* grad = dlogits.defined() ? data(dlogits) + m * v : nullptr;
      if (targets.data<int32_t>()[m] < 0) {
        data(loss)[m] = 0;
        if (grad != nullptr) std::fill_n(grad, v, T{0});
        continue;
      }
      const T lse_q = exp_sum(x, v).log(), lse_p = exp_sum(y, v).log();
      data(loss)[m] = lane_sum<T>(v, [=](int64_t i) {
        const T p = vector_exp(y[i] - lse_p);
        const T term = p * ((y[i] - lse_p) - (x[i] - lse_q));
        return p == 0 ? T{0} : term;
      });
      if (grad != nullptr) kl_gradient(grad, x, y, v, lse_q, lse_p, factor);
    }
  });
}

template <typename T>
void CpuBackend<T>::do_cross_entropy_chunk(const Tensor& loss, const Tensor& state,
                                           const Tensor& logits, const Tensor& targets,
                                           int64_t first_word, Write mode) {
  const int64_t rows = logits.dim(0), n = logits.dim(1);
  auto* const states = reinterpret_cast<CrossEntropySums<T>*>(data(state));
  parallel_for(rows, row_grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t target = targets.data<int32_t>()[m], column = target - first_word;
      data(loss)[m] = 0;
      if (target < 0) continue;
      const T* x = data(logits) + m * n;
      CrossEntropySums<T> sums = mode == Write::Add ? states[m] : CrossEntropySums<T>{};
      sums.all.merge(exp_sum(x, n));
      if (column >= 0 && column < n) sums.target_logit = x[column];
      states[m] = sums;
      data(loss)[m] = sums.all.log() - sums.target_logit;
    }
  });
}

template <typename T>
void CpuBackend<T>::do_cross_entropy_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                                    const Tensor& state, const Tensor& targets,
                                                    int64_t first_word, double scale) {
  const int64_t rows = logits.dim(0), n = logits.dim(1);
  const auto* const states = reinterpret_cast<const CrossEntropySums<T>*>(data(state));
  parallel_for(rows, row_grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t target = targets.data<int32_t>()[m];
      T* grad = data(dlogits) + m * n;
      if (target < 0)
        std::fill_n(grad, n, T{0});
      else
        cross_entropy_gradient(grad, data(logits) + m * n, n, states[m].all.log(),
                               target - first_word, static_cast<T>(scale));
    }
  });
}

template <typename T>
void CpuBackend<T>::do_kl_divergence_chunk(const Tensor& loss, const Tensor& state,
                                           const Tensor& logits, const Tensor& teacher,
                                           const Tensor& targets, Write mode) {
  const int64_t rows = logits.dim(0), n = logits.dim(1);
  auto* const states = reinterpret_cast<KlSums<T>*>(data(state));
  parallel_for(rows, row_grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      data(loss)[m] = 0;
      if (targets.data<int32_t>()[m] < 0) continue;
      KlSums<T> sums = mode == Write::Add ? states[m] : KlSums<T>{};
      sums.merge(kl_sums(data(logits) + m * n, data(teacher) + m * n, n));
      states[m] = sums;
      data(loss)[m] = sums.loss();
    }
  });
}

template <typename T>
void CpuBackend<T>::do_kl_divergence_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                                    const Tensor& teacher, const Tensor& state,
                                                    const Tensor& targets, double scale) {
  const int64_t rows = logits.dim(0), n = logits.dim(1);
  const auto* const states = reinterpret_cast<const KlSums<T>*>(data(state));
  parallel_for(rows, row_grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      T* grad = data(dlogits) + m * n;
      if (targets.data<int32_t>()[m] < 0)
        std::fill_n(grad, n, T{0});
      else
        kl_gradient(grad, data(logits) + m * n, data(teacher) + m * n, n, states[m].student.log(),
                    states[m].teacher.log(), static_cast<T>(scale));
    }
  });
}

template <typename T>
void CpuBackend<T>::do_jensen_shannon(const Tensor& loss, const Tensor& dlogits,
                                      const Tensor& logits, const Tensor& teacher,
                                      const Tensor& targets, double beta, double scale) {
  const int64_t rows = logits.dim(0), v = logits.dim(1);
  parallel_for(rows, row_grain(v), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T *x = data(logits) + m * v, *y = data(teacher) + m * v;
      T* grad = dlogits.defined() ? data(dlogits) + m * v : nullptr;
      if (targets.data<int32_t>()[m] < 0) {
        data(loss)[m] = 0;
        if (grad != nullptr) std::fill_n(grad, v, T{0});
        continue;
      }
      const JensenShannonRow<T> row{exp_sum(x, v).log(), exp_sum(y, v).log(), static_cast<T>(beta)};
      const MixtureKl<T> kl = row.sums(x, y, v);
      data(loss)[m] = row.loss(kl);
      if (grad != nullptr) row.gradient(grad, x, y, v, kl.student, static_cast<T>(scale));
    }
  });
}

template <typename T>
void CpuBackend<T>::do_jensen_shannon_chunk(const Tensor& loss, const Tensor& student_kl,
                                            const Tensor& logits, const Tensor& teacher,
                                            const Tensor& state, const Tensor& targets, double beta,
                                            Write mode) {
  const int64_t rows = logits.dim(0), n = logits.dim(1);
  const auto* const states = reinterpret_cast<const KlSums<T>*>(data(state));
  parallel_for(rows, row_grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      if (mode == Write::Overwrite) data(loss)[m] = data(student_kl)[m] = 0;
      if (targets.data<int32_t>()[m] < 0) continue;
      const JensenShannonRow<T> row{states[m].student.log(), states[m].teacher.log(),
                                    static_cast<T>(beta)};
      const MixtureKl<T> kl = row.sums(data(logits) + m * n, data(teacher) + m * n, n);
      data(loss)[m] += row.loss(kl);
      data(student_kl)[m] += kl.student;
    }
  });
}

template <typename T>
void CpuBackend<T>::do_jensen_shannon_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                                     const Tensor& teacher, const Tensor& state,
                                                     const Tensor& student_kl,
                                                     const Tensor& targets, double beta,
                                                     double scale) {
  const int64_t rows = logits.dim(0), n = logits.dim(1);
  const auto* const states = reinterpret_cast<const KlSums<T>*>(data(state));
  parallel_for(rows, row_grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      T* grad = data(dlogits) + m * n;
      if (targets.data<int32_t>()[m] < 0) {
        std::fill_n(grad, n, T{0});
        continue;
      }
      const JensenShannonRow<T> row{states[m].student.log(), states[m].teacher.log(),
                                    static_cast<T>(beta)};
      row.gradient(grad, data(logits) + m * n, data(teacher) + m * n, n, data(student_kl)[m],
                   static_cast<T>(scale));
    }
  });
}

BBB_CPU_INSTANTIATE(cross_entropy);
BBB_CPU_INSTANTIATE(kl_divergence);
BBB_CPU_INSTANTIATE(cross_entropy_chunk);
BBB_CPU_INSTANTIATE(cross_entropy_chunk_backward);
BBB_CPU_INSTANTIATE(kl_divergence_chunk);
BBB_CPU_INSTANTIATE(kl_divergence_chunk_backward);
BBB_CPU_INSTANTIATE(jensen_shannon);
BBB_CPU_INSTANTIATE(jensen_shannon_chunk);
BBB_CPU_INSTANTIATE(jensen_shannon_chunk_backward);

}  // namespace bbb::engine
