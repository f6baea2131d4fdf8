// Times the algorithms of a product and chooses one.
//
// Candidates run interleaved, so that clock drift slows all of them alike; each is judged by its
// median time. Operands are random normals; if alpha is on the device, A is a quantized weight and
// holds their levels on a 2-bit grid (zeros and numbers with few bits take less power). They rotate
// through more memory than the L2 cache holds, as in a training step. Every round starts with
// untimed products: the GPU then runs behind the host, and no wait for a launch is measured.
//
// Candidates are the library's suggestions. If the run will spend long on a product, the library's
// other kernels (gemm_search.cpp) are candidates too; short trials keep the best of all. Long
// products are then timed in long runs. They keep the GPU at its power limit, where the clock
// depends on the power of the work: the algorithm of least energy is the fastest, even if it needs
// more cycles. This shows only if each candidate runs alone for longer than the clock takes to
// stabilize. The clock also drifts by some per cent, so there are rounds, each longer and with
// fewer candidates than the one before.
#ifdef BBB_HAS_CUDA
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iterator>
#include <numeric>
#include <utility>

#include "cuda/cuda_backend.h"
#include "cuda/gemm.h"
#include "engine/bf16.h"
#include "engine/median.h"
#include "engine/rng.h"
#include "quant/grid.h"

namespace bbb::cuda {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMostSuggestions = 8;
constexpr size_t kFinalists = 12;       // candidates that the trials keep
constexpr int kTrials = 2;              // the faster one counts: the other may have been disturbed
constexpr double kMaxTimeRatio = 0.99;  // to the first suggestion: a smaller gain is noise
// A search takes about 4 s and saves 3 to 6 % of the product's time.
constexpr double kMinSearchedRun_s = 75;
constexpr int kFewestRounds = 5, kMostRounds = 15;
constexpr double kSecondsPerProduct = 0.1;  // no further round once this is spent
constexpr int kUntimedProducts = 2;         // before a round
constexpr float kLong_ms = 0.25f;           // from here on a product may reach the power limit
constexpr float kWarm_ms = 200;             // before the first LongRound
struct LongRound {
  size_t candidates;
  int passes;  // every other one in reverse order, against drift
  float untimed_ms, timed_ms;
};
constexpr LongRound kLongRounds[] = {{kFinalists, 1, 25, 45}, {5, 2, 40, 70}, {3, 2, 40, 110}};
constexpr int64_t kNormals = 1 << 18;
constexpr int64_t kCompared = 1 << 18;  // values of D, in each of three places
constexpr int kRepeats = 3;
constexpr int64_t kAlignBytes = 512;

static_assert(sizeof(GemmAlgorithm) == sizeof(uint64_t[8]));
constexpr size_t kHexDigits = 16;  // of each word

int64_t aligned(int64_t bytes) { return (bytes + kAlignBytes - 1) / kAlignBytes * kAlignBytes; }

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::string to_text(const GemmAlgorithm& algorithm) {
  std::string text;
  for (const uint64_t word : algorithm.data) {
    char digits[kHexDigits + 1];
    std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(word));
    text += digits;
  }
  return text;
}

// False if the text is not that of an algorithm.
bool from_text(GemmAlgorithm& algorithm, const std::string& text) {
  if (text.size() != kHexDigits * std::size(algorithm.data)) return false;
  const char* digits = text.data();
  for (uint64_t& word : algorithm.data) {
    const auto [end, error] = std::from_chars(digits, digits + kHexDigits, word, 16);
    if (error != std::errc() || end != digits + kHexDigits) return false;
    digits = end;
  }
  return true;
}

int64_t l2_bytes() {
  int device = 0, bytes = 0;
  BBB_CUDA(cudaGetDevice(&device));
  BBB_CUDA(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
  return bytes;
}

// Runs one product with candidate number i.
using Multiply = std::function<void(size_t)>;

float elapsed_ms(const EventHandle& begin, const EventHandle& end) {
  float ms = 0;
  BBB_CUDA(cudaEventElapsedTime(&ms, begin.get(), end.get()));
  return ms;
}

struct Candidates {
  std::vector<GemmAlgorithm> algorithms;
  std::vector<float> times_ms;  // of one product

  // The fastest first.
  std::vector<size_t> order() const {
    std::vector<size_t> order(algorithms.size());
    std::iota(order.begin(), order.end(), size_t{0});
    sort(order);
    return order;
  }
  void sort(std::vector<size_t>& some) const {
    std::sort(some.begin(), some.end(),
              [&](size_t a, size_t b) { return times_ms[a] < times_ms[b]; });
  }
  float least_ms() const { return *std::min_element(times_ms.begin(), times_ms.end()); }
};

// The first candidate and the fastest of the others, each timed alone. Candidates that fail to
// launch are left out: the library's check may have passed them.
Candidates best_of_trials(cudaStream_t stream, Candidates all, const Multiply& multiply) {
  const EventHandle begin = make_event(cudaEventDefault), end = make_event(cudaEventDefault);
  all.times_ms.assign(all.algorithms.size(), INFINITY);
  std::vector<bool> refused(all.algorithms.size(), false);
  const auto starts = [&](size_t i) {
    try {
      multiply(i);  // loads the kernel, too
      return true;
    } catch (const Error&) {
      cudaGetLastError();  // or the next launch reports it
      return false;
    }
  };
  for (int trial = 0; trial < kTrials; ++trial)
    for (size_t i = 0; i < all.algorithms.size(); ++i) {
      if (trial == 0 && i > 0) refused[i] = !starts(i);
      if (refused[i]) continue;
      BBB_CUDA(cudaEventRecord(begin.get(), stream));
      multiply(i);
      BBB_CUDA(cudaEventRecord(end.get(), stream));
      BBB_CUDA(cudaStreamSynchronize(stream));
      all.times_ms[i] = std::min(all.times_ms[i], elapsed_ms(begin, end));
    }
  Candidates best{{all.algorithms[0]}, {all.times_ms[0]}};
  for (size_t i : all.order())
    if (i > 0 && !refused[i] && best.algorithms.size() < kFinalists) {
      best.algorithms.push_back(all.algorithms[i]);
      best.times_ms.push_back(all.times_ms[i]);
    }
  return best;
}

// The median time of every candidate, all run interleaved.
std::vector<float> interleaved_times(cudaStream_t stream, size_t count, const Multiply& multiply) {
  std::vector<EventHandle> events;  // product i of a round runs between events i and i + 1
  for (size_t i = 0; i <= count; ++i) events.push_back(make_event(cudaEventDefault));
  std::vector<std::vector<float>> times_ms(count);
  for (size_t i = 0; i < count; ++i) multiply(i);  // loads the kernels
  BBB_CUDA(cudaStreamSynchronize(stream));
  const auto start = Clock::now();
  for (int round = 0;
       round < kFewestRounds || (round < kMostRounds && seconds_since(start) < kSecondsPerProduct);
       ++round) {
    // Rotate the order every round, so that no candidate always runs behind the same one.
    const auto candidate = [&](size_t i) { return (i + static_cast<size_t>(round)) % count; };
    for (int i = 0; i < kUntimedProducts; ++i) multiply(0);
    BBB_CUDA(cudaEventRecord(events[0].get(), stream));
    for (size_t i = 0; i < count; ++i) {
      multiply(candidate(i));
      BBB_CUDA(cudaEventRecord(events[i + 1].get(), stream));
    }
    BBB_CUDA(cudaStreamSynchronize(stream));
    for (size_t i = 0; i < count; ++i)
      times_ms[candidate(i)].push_back(elapsed_ms(events[i], events[i + 1]));
  }
  std::vector<float> medians_ms;
  for (const std::vector<float>& times : times_ms) medians_ms.push_back(engine::median(times));
  return medians_ms;
}

// Replaces the candidates' times by means over long runs of each alone. Returns the candidates of
// the last round, fastest first. Within a round the stream always has work queued.
std::vector<size_t> by_long_runs(cudaStream_t stream, Candidates& candidates,
                                 const Multiply& multiply) {
  struct Window {
    size_t candidate;
    int products;
    EventHandle begin, end;
  };
  const std::vector<float> about_ms = candidates.times_ms;
  const auto run_for = [&](float ms, size_t i) {
    const int products = 1 + static_cast<int>(ms / about_ms[i]);
    for (int p = 0; p < products; ++p) multiply(i);
    return products;
  };
  std::vector<double> spent_ms(about_ms.size(), 0), products(about_ms.size(), 0);
  std::vector<size_t> order = candidates.order();
  run_for(kWarm_ms, order[0]);
  for (const LongRound& round : kLongRounds) {
    order.resize(std::min(order.size(), round.candidates));
    // The first suggestion stays: the others are compared with it.
    if (std::find(order.begin(), order.end(), 0) == order.end()) order.push_back(0);
    std::vector<Window> windows;
    for (int pass = 0; pass < round.passes; ++pass) {
      for (size_t i : order) {
        run_for(round.untimed_ms, i);
        Window window{i, 0, make_event(cudaEventDefault), make_event(cudaEventDefault)};
        BBB_CUDA(cudaEventRecord(window.begin.get(), stream));
        window.products = run_for(round.timed_ms, i);
        BBB_CUDA(cudaEventRecord(window.end.get(), stream));
        windows.push_back(std::move(window));
      }
      std::reverse(order.begin(), order.end());
    }
    BBB_CUDA(cudaStreamSynchronize(stream));
    for (const Window& window : windows) {
      spent_ms[window.candidate] += elapsed_ms(window.begin, window.end);
      products[window.candidate] += window.products;
    }
    for (size_t i : order) candidates.times_ms[i] = static_cast<float>(spent_ms[i] / products[i]);
    candidates.sort(order);
  }
  return order;
}

// The bytes of D at its start, in its middle and at its end.
std::vector<uint8_t> compared_bytes(cudaStream_t stream, const char* d, int64_t values,
                                    int64_t element_bytes) {
  const int64_t count = std::min(values, kCompared), bytes = count * element_bytes;
  const int64_t begins[] = {0, (values - count) / 2, values - count};
  std::vector<uint8_t> all(static_cast<size_t>(bytes) * std::size(begins));
  for (size_t i = 0; i < std::size(begins); ++i)
    BBB_CUDA(cudaMemcpyAsync(all.data() + i * static_cast<size_t>(bytes),
                             d + begins[i] * element_bytes, static_cast<size_t>(bytes),
                             cudaMemcpyDeviceToHost, stream));
  BBB_CUDA(cudaStreamSynchronize(stream));
  return all;
}

// Whether a and b can be the same sums in another order, each rounded once to `dtype`.
bool agree(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b, cudaDataType_t dtype) {
  const bool bf16 = dtype == CUDA_R_16BF;
  const auto value = [bf16](const std::vector<uint8_t>& bytes, size_t i) {
    float x = 0;
    uint16_t half = 0;
    if (!bf16) {
      std::memcpy(&x, &bytes[i], sizeof x);
      return x;
    }
    std::memcpy(&half, &bytes[i], sizeof half);
    return engine::from_bf16(half);
  };
  double error = 0, norm = 0;
  for (size_t i = 0; i < a.size(); i += bf16 ? 2 : 4) {
    const double want = value(b, i), difference = value(a, i) - want;
    error += difference * difference;
    norm += want * want;
  }
  const double tolerance = bf16 ? 0x1p-7 : 0x1p-13;
  return error <= tolerance * tolerance * norm;  // false if there is a NaN
}

}  // namespace

std::string to_string(const GemmShape& s) {
  const auto letter = [](cublasOperation_t op) { return op == CUBLAS_OP_N ? 'N' : 'T'; };
  return cat(letter(s.op_a), letter(s.op_b), " ", s.m, "x", s.n, "x", s.k,
             s.out == CUDA_R_16BF ? " bf16" : " f32", s.alpha_on_device ? " scaled" : "",
             s.accumulate ? " added" : "", " aligned ", s.align_a, " ", s.align_b, " ", s.align_c,
             " ", s.align_d);
}

void GemmPlanner::tune(std::optional<engine::GemmTuning> tuning) {
  plans_.clear();
  timed_ = searched_ = improved_ = 0;
  timing_s_ = 0;
  tuning_ = std::move(tuning);
}

void GemmPlanner::say(const std::string& line) const {
  if (tuning_->say) tuning_->say(line);
}

std::vector<std::string> GemmPlanner::candidates(const GemmShape& shape) const {
  std::vector<std::string> texts;
  for (const GemmAlgorithm& algorithm : all_candidates(make_plan(shape), shape))
    texts.push_back(to_text(algorithm));
  return texts;
}

// Decides a new plan, unless it must be timed.
void GemmPlanner::apply_tuning(Plan& plan, const GemmShape& shape) const {
  plan.decided = true;
  if (!tuning_) return;
  const std::string name = to_string(shape);
  const auto known = tuning_->known.algorithms.find(name);
  if (known != tuning_->known.algorithms.end())
    plan.algorithm = known_algorithm(plan, name, known->second);
  else
    plan.decided = shape.flops() < tuning_->least_flops;
}

GemmAlgorithm GemmPlanner::known_algorithm(const Plan& plan, const std::string& name,
                                           const std::string& text) const {
  GemmAlgorithm algorithm{};
  BBB_CHECK(from_text(algorithm, text), tuning_->where, ": the algorithm of the product ", name,
            " is malformed");
  cublasLtMatmulHeuristicResult_t needs{};
  BBB_CHECK(runs(plan, algorithm, needs), tuning_->where, ": the algorithm of the product ", name,
            " does not run here (", cublasLtGetStatusString(needs.state), ", ", needs.workspaceSize,
            " bytes of workspace)");
  return algorithm;
}

bool GemmPlanner::runs(const Plan& plan, const GemmAlgorithm& algorithm,
                       cublasLtMatmulHeuristicResult_t& needs) const {
  needs.state =
      cublasLtMatmulAlgoCheck(handle_.get(), plan.product.get(), plan.a.get(), plan.b.get(),
                              plan.out.get(), plan.out.get(), &algorithm, &needs);
  return needs.state == CUBLAS_STATUS_SUCCESS &&
         needs.workspaceSize <= static_cast<size_t>(kGemmWorkspaceBytes);
}

std::vector<GemmAlgorithm> GemmPlanner::all_candidates(const Plan& plan,
                                                       const GemmShape& shape) const {
  std::vector<GemmAlgorithm> all = suggestions(plan, shape, kMostSuggestions);
  const std::vector<GemmAlgorithm> more = explored(plan, shape);
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

bool GemmPlanner::has_undecided() const {
  return std::any_of(plans_.begin(), plans_.end(),
                     [](const auto& entry) { return !entry.second.decided; });
}

void GemmPlanner::decide_recorded() {
  decide(tuning_->step_runs);
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%.2f s", timing_s_);
  say(cat("matrix products: algorithms of ", timed_, " timed in ", seconds, ", of ", searched_,
          " searched; ", improved_, " do not take the library's first suggestion"));
}

// Times the undecided plans. runs: how often whatever encountered them is going to run.
void GemmPlanner::decide(int64_t runs) {
  const auto start = Clock::now();
  std::vector<Plan*> decided;
  for (auto& [shape, plan] : plans_) {
    if (plan.decided) continue;
    const std::string first = to_text(plan.algorithm);
    plan.algorithm = fastest(plan, shape, runs);
    const std::string text = to_text(plan.algorithm);
    tuning_->known.algorithms[to_string(shape)] = text;
    improved_ += text != first ? 1 : 0;
    decided.push_back(&plan);
  }
  timed_ += static_cast<int64_t>(decided.size());
  pool_->release_cached();
  if (tuning_->keep) tuning_->keep(tuning_->known);
  for (Plan* plan : decided) plan->decided = true;
  timing_s_ += seconds_since(start);
}

GemmAlgorithm GemmPlanner::fastest(const Plan& plan, const GemmShape& shape, int64_t runs) {
  Candidates candidates{suggestions(plan, shape, kMostSuggestions), {}};
  const int64_t element_bytes = shape.out == CUDA_R_16BF ? 2 : 4;
  const int64_t a_bytes = aligned(2 * shape.m * shape.k), b_bytes = aligned(2 * shape.n * shape.k);
  const int64_t set_bytes = a_bytes + b_bytes + aligned(element_bytes * shape.m * shape.n);
  if (set_bytes > tuning_->memory_bytes) {
    say(cat("matrix products: ", to_string(shape), " is not timed: its operands take ",
            set_bytes >> 20, " MiB, timing may take ", tuning_->memory_bytes >> 20, " MiB"));
    return candidates.algorithms[0];
  }
  const int64_t sets = std::min(tuning_->memory_bytes / set_bytes, 2 + 2 * l2_bytes() / set_bytes);
  std::shared_ptr<engine::Storage> memory;
  try {
    memory = pool_->allocate(sets * set_bytes);
  } catch (const Error& error) {  // another program took the free memory
    say(cat("matrix products: ", to_string(shape), " is not timed: ", error.what()));
    return candidates.algorithms[0];
  }
  fill(memory->data(), memory->bytes(), normals());
  if (shape.alpha_on_device)
    for (int64_t set = 0; set < sets; ++set)
      fill(static_cast<char*>(memory->data()) + set * set_bytes, a_bytes, levels());

  int64_t next_set = 0;
  const auto multiply = [&](size_t candidate) {
    char* const a = static_cast<char*>(memory->data()) + next_set++ % sets * set_bytes;
    char* const b = a + a_bytes;
    char* const d = b + b_bytes;
    launch(plan, shape, candidates.algorithms[candidate], d, a, b, d, &constants_[1]);
  };
  const auto time_interleaved = [&] {
    candidates.times_ms = interleaved_times(stream_, candidates.algorithms.size(), multiply);
    return candidates.order();
  };
  std::vector<size_t> order = time_interleaved();
  const double run_s = static_cast<double>(plan.encounters * runs) * 1e-3 * candidates.least_ms();
  if (run_s >= kMinSearchedRun_s) {
    ++searched_;
    candidates.algorithms = all_candidates(plan, shape);
    candidates = best_of_trials(stream_, candidates, multiply);  // a copy: multiply reads them
    order = candidates.least_ms() >= kLong_ms ? by_long_runs(stream_, candidates, multiply)
                                              : time_interleaved();
  }
  const auto result = [&](size_t candidate) {
    next_set = 0;
    char* const d = static_cast<char*>(memory->data()) + a_bytes + b_bytes;
    BBB_CUDA(
        cudaMemsetAsync(d, 0, static_cast<size_t>(element_bytes * shape.m * shape.n), stream_));
    multiply(candidate);
    return compared_bytes(stream_, d, shape.m * shape.n, element_bytes);
  };
  for (size_t i : order) {
    if (i == 0 || candidates.times_ms[i] > kMaxTimeRatio * candidates.times_ms[0]) break;
    const GemmAlgorithm& algorithm = candidates.algorithms[i];
    const std::vector<uint8_t> once = result(i);
    bool repeats = true;
    for (int again = 0; again < kRepeats; ++again) repeats = repeats && result(i) == once;
    if (repeats && agree(once, result(0), shape.out)) return algorithm;
    say(cat("matrix products: ", to_string(shape), ": the algorithm ", to_text(algorithm),
            " is left out: ",
            repeats ? "it does not give what the library's first suggestion gives"
                    : "it does not give the same bytes twice"));
  }
  return candidates.algorithms[0];
}

const std::vector<uint16_t>& GemmPlanner::normals() {
  if (normals_.empty()) {
    engine::Rng rng(0);
    for (int64_t i = 0; i < kNormals; ++i)
      normals_.push_back(engine::to_bf16(static_cast<float>(rng.normal())));
  }
  return normals_;
}

const std::vector<uint16_t>& GemmPlanner::levels() {
  if (!levels_.empty()) return levels_;
  constexpr quant::WeightGrid kSpec{.bits = 2, .group = 32};
  // S of these normals: the maximum group range is 7.2, and 7.2 / 3 / 448 rounds up to 2^-7.
  const quant::GroupQuantizer quantizer(0x1p-7f, kSpec.bits);
  for (size_t begin = 0; begin < normals().size(); begin += kSpec.group) {
    const auto x = [&](int i) {
      return engine::from_bf16(normals_[begin + static_cast<size_t>(i)]);
    };
    quant::Range<float> range;
    for (int i = 0; i < kSpec.group; ++i) range.include(x(i));
    const quant::GroupLevels group = quantizer(range).levels;
    for (int i = 0; i < kSpec.group; ++i)
      levels_.push_back(engine::to_bf16(group.level(group.steps(x(i)))));
  }
  return levels_;
}

// Fills with the values, repeated. Two of them read as one F32 are finite too.
void GemmPlanner::fill(void* device, int64_t bytes, const std::vector<uint16_t>& values) const {
  const auto stretch = std::min(bytes, static_cast<int64_t>(values.size() * sizeof values[0]));
  BBB_CUDA(cudaMemcpyAsync(device, values.data(), static_cast<size_t>(stretch),
                           cudaMemcpyHostToDevice, stream_));
  for (int64_t done = stretch; done < bytes;) {
    const int64_t more = std::min(done, bytes - done);
    BBB_CUDA(cudaMemcpyAsync(static_cast<char*>(device) + done, device, static_cast<size_t>(more),
                             cudaMemcpyDeviceToDevice, stream_));
    done += more;
  }
}

}  // namespace bbb::cuda
#endif
