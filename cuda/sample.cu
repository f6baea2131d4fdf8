// ids[m] = the next token of row m (engine/sampling.h).   ids I32 (M); logits F32 (M, V).
//
// A row is cut into segments of kSegment tokens, a block each; the last kernel has a block a row.
//
//     best          per segment the largest logit, ties to the lower id; zeros the histograms
//     histogram 0   weights by key >> 18
//     histogram 1   weights by key >> 9, of the keys in the bin where the nucleus ends
//     histogram 2   weights by key, of the keys in that bin's bin where it ends
//     sums          per segment the weights above the nucleus's last key, and its ties
//     pick          the segment in which the sum passes the draw, then the token
//
// Greedy runs best and pick; without a nucleus there are no histograms. Weights are integers, so
// atomic additions give the same sums in every order. Each kernel reads the logits once, 4 bytes a
// token; pick reads one segment.
#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/vector.h"
#include "engine/sampling.h"

namespace bbb::cuda {
namespace {

using engine::kLastSampleKey;
using Sum64 = unsigned long long;  // as atomicAdd takes it

constexpr int kThreads = 256;
constexpr int kPerThread = 8;
constexpr int kSegment = kThreads * kPerThread;

// Level l of the search counts keys by key >> shift_of(l).
constexpr int kLevels = 3;
BBB_HD constexpr int shift_of(int level) { return 9 * (kLevels - 1 - level); }
BBB_HD constexpr int bins_of(int level) { return level == 0 ? 1280 : 512; }
BBB_HD constexpr int first_bin_of(int level) { return level == 0 ? 0 : 1280 + 512 * (level - 1); }
constexpr int kBins = first_bin_of(kLevels);
static_assert(bins_of(0) > kLastSampleKey >> shift_of(0) && bins_of(0) % kThreads == 0 &&
              bins_of(1) % kThreads == 0);

// A block adds up to kSegment weights of kWeightBits bits in two counters of 32 bits.
constexpr int kLowBits = 20;
static_assert(int64_t{kSegment} << kLowBits <= int64_t{1} << 32 &&
              int64_t{kSegment} << (engine::kWeightBits - kLowBits) < int64_t{1} << 32);

// Weights of keys below a key, and the number of tokens that have it.
struct Sums {
  Sum64 above;
  unsigned ties;
};

// Where the nucleus ends, as far as it is known: at a key whose upper bits are `prefix`. `above`:
// the weights of keys with smaller upper bits. target: the weight that the nucleus must reach.
struct Cut {
  Sum64 above, target;
  unsigned prefix;
};

struct SampleArgs {
  int32_t* ids;
  int32_t* log;   // (n, M), or null
  uint8_t* seen;  // (M, seen_bytes), or null
  Sum64* best;    // (M, segments): ranked() of the best token
  Sum64* bins;    // (M, kBins)
  Cut* cuts;      // (M, kLevels)
  Sums* sums;     // (M, segments)
  LogitFault* fault;
  const float* logits;       // (M, V)
  const uint2* seeds;        // (M)
  const int32_t* positions;  // (M)
  const int32_t* cursor;
  int64_t vocab, seen_bytes, log_rows;
  int rows, segments;
  float penalty, temperature;  // temperature 0: greedy
  double top_p;
};

// The logits of kCount tokens from `first` on, `step` apart, after the penalty; 0 past the
// vocabulary. All loads are issued before the first one is used.
template <int kCount>
__device__ void load_logits(float (&x)[kCount], const SampleArgs& args, int row, int64_t first,
                            int step) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t token = first + i * step;
    x[i] = token < args.vocab ? load_past_l1(args.logits + row * args.vocab + token) : 0.0f;
  }
  if (args.penalty == 1.0f) return;
  unsigned bits[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t token = first + i * step;
    bits[i] = token < args.vocab ? args.seen[row * args.seen_bytes + token / 8] >> token % 8 : 0u;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (bits[i] & 1) x[i] = engine::penalized(x[i], args.penalty);
}
__device__ float logit_of(const SampleArgs& args, int row, int64_t token) {
  float x[1];
  load_logits(x, args, row, token, 1);
  return x[0];
}

// A token's rank as an integer: larger logits first, then lower ids. A logit that is NaN or
// infinite is ranked above all others.
__device__ Sum64 ranked(float logit, int64_t token) {
  const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0
  const unsigned order = !isfinite(logit) ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
  return Sum64{order} << 32 | static_cast<unsigned>(~token);
}
__device__ bool is_bad(Sum64 rank) { return rank >> 32 == ~0u; }
__device__ int32_t token_of(Sum64 rank) {
  return static_cast<int32_t>(~static_cast<unsigned>(rank));
}
__device__ float logit_of(Sum64 rank) {
  const unsigned order = static_cast<unsigned>(rank >> 32);
  return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

// Every thread gets the maximum over the block.
__device__ Sum64 block_max(Sum64 x) {
  __shared__ Sum64 warps[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    x = max(x, __shfl_xor_sync(0xffffffffu, x, offset));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
#pragma unroll
  for (int w = 1; w < kThreads / 32; ++w) x = max(x, warps[w]);
  __syncthreads();
  return x;
}

__device__ void add(Sums& to, const Sums& x) {
  to.above += x.above;
  to.ties += x.ties;
}

// The sums of all threads before this one. `total`: of all threads.
__device__ Sums sums_before(const Sums& x, Sums* total) {
  __shared__ Sums warps[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Sums inclusive = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Sums other{__shfl_up_sync(0xffffffffu, inclusive.above, offset),
                     __shfl_up_sync(0xffffffffu, inclusive.ties, offset)};
    if (lane >= offset) add(inclusive, other);
  }
  if (lane == 31) warps[warp] = inclusive;
  __syncthreads();
  Sums before{inclusive.above - x.above, inclusive.ties - x.ties};
  *total = {};
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) add(before, warps[w]);
    add(*total, warps[w]);
  }
  __syncthreads();
  return before;
}

__device__ Sum64 best_of_row(const SampleArgs& args, int row) {
  Sum64 best = 0;
  for (int s = threadIdx.x; s < args.segments; s += kThreads)
    best = max(best, load_past_l1(args.best + int64_t{row} * args.segments + s));
  return block_max(best);
}

// Calls each(token, logit) for this thread's tokens of a segment.
template <typename Each>
__device__ void for_segment(const SampleArgs& args, int row, int segment, const Each& each) {
  const int64_t first = int64_t{segment} * kSegment + threadIdx.x;
  float x[kPerThread];
  load_logits(x, args, row, first, kThreads);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t token = first + i * kThreads;
    if (token < args.vocab) each(token, x[i]);
  }
}

// grid (M * segments) of this kernel and the next two
__global__ void sample_best_kernel(const SampleArgs args) {
  start_next_kernel();
  wait_for_previous_kernel();
  const int row = blockIdx.x / args.segments, segment = blockIdx.x % args.segments;
  if (args.bins != nullptr)
    for (int i = segment * kThreads + threadIdx.x; i < kBins; i += args.segments * kThreads)
      args.bins[int64_t{row} * kBins + i] = 0;
  Sum64 best = 0;
  for_segment(args, row, segment,
              [&](int64_t token, float logit) { best = max(best, ranked(logit, token)); });
  best = block_max(best);
  if (threadIdx.x == 0) args.best[blockIdx.x] = best;
}

// The first of n items at which the sums of all items up to it have `passed`.
struct Crossing {
  Sums before;  // the item
  Sums total;
  int item;
};

// In every thread of the block. item(i): the sums of item i; passed(sums, total): false without
// items, true with all of them, and never false again. A thread adds up neighbouring items.
template <typename Item, typename Passed>
__device__ Crossing find_crossing(int n, const Item& item, const Passed& passed) {
  __shared__ Crossing found;
  const int each = (n + kThreads - 1) / kThreads;
  const int begin = min(n, static_cast<int>(threadIdx.x) * each), end = min(n, begin + each);
  Sums own{}, total;
  for (int i = begin; i < end; ++i) add(own, item(i));
  Sums before = sums_before(own, &total);
  add(own, before);
  if (!passed(before, total) && passed(own, total)) {  // one thread
    int i = begin;
    for (;; ++i) {
      Sums next = before;
      add(next, item(i));
      if (passed(next, total)) break;
      before = next;
    }
    found = {before, total, i};
  }
  __syncthreads();
  return found;
}

// Where the nucleus ends, by the histograms of all levels before `level`. The row's first block
// stores it for the next kernel.
__device__ Cut cut_before(const SampleArgs& args, int row, int segment, int level) {
  if (level == 0) return {};
  const int counted = level - 1;  // the level of the newest histogram
  Cut* const cuts = args.cuts + int64_t{row} * kLevels;
  const Cut last = counted == 0 ? Cut{} : cuts[counted - 1];
  const Sum64* const bins = args.bins + int64_t{row} * kBins + first_bin_of(counted);
  const auto target = [&](const Sums& total) {
    return counted == 0 ? Sum64{engine::sample_target(args.top_p, total.above)} : last.target;
  };
  const Crossing end = find_crossing(
      bins_of(counted),
      [&](int i) {
        return Sums{bins[i], 0};
      },
      [&](const Sums& sums, const Sums& total) {
        return last.above + sums.above >= target(total);
      });
  const Cut cut{last.above + end.before.above, target(end.total),
                last.prefix * bins_of(counted) + end.item};
  if (segment == 0 && threadIdx.x == 0) cuts[counted] = cut;
  return cut;
}

template <int kLevel>
__global__ void sample_histogram_kernel(const SampleArgs args) {
  constexpr int kOwnBins = bins_of(kLevel);
  __shared__ unsigned low[kOwnBins], high[kOwnBins];
  const int row = blockIdx.x / args.segments, segment = blockIdx.x % args.segments;
  const Sum64 best = best_of_row(args, row);
  if (is_bad(best)) return;
  for (int i = threadIdx.x; i < kOwnBins; i += kThreads) low[i] = high[i] = 0;
  const Cut cut = cut_before(args, row, segment, kLevel);
  __syncthreads();
  const float most = logit_of(best);
  for_segment(args, row, segment, [&](int64_t, float logit) {
    const float e = engine::relative_probability(logit - most, args.temperature);
    const unsigned key = engine::sample_key(e);
    if (key > kLastSampleKey) return;
    unsigned bin = key >> shift_of(kLevel);
    if constexpr (kLevel > 0) {
      if (bin / kOwnBins != cut.prefix) return;
      bin %= kOwnBins;
    }
    const Sum64 weight = engine::sample_weight(e);
    atomicAdd(&low[bin], static_cast<unsigned>(weight & ((1u << kLowBits) - 1)));
    atomicAdd(&high[bin], static_cast<unsigned>(weight >> kLowBits));
  });
  __syncthreads();
  Sum64* const bins = args.bins + int64_t{row} * kBins + first_bin_of(kLevel);
  for (int i = threadIdx.x; i < kOwnBins; i += kThreads) {
    const Sum64 sum = low[i] + (Sum64{high[i]} << kLowBits);
    if (sum != 0) atomicAdd(&bins[i], sum);
  }
}

// What a token adds to the sums of a nucleus that ends at `last_key`.
__device__ Sums sums_of(float e, unsigned last_key) {
  const unsigned key = engine::sample_key(e);
  return {key < last_key ? Sum64{engine::sample_weight(e)} : 0, key == last_key ? 1u : 0u};
}

__global__ void sample_sums_kernel(const SampleArgs args) {
  const int row = blockIdx.x / args.segments, segment = blockIdx.x % args.segments;
  const Sum64 best = best_of_row(args, row);
  if (is_bad(best)) return;
  const unsigned last_key =
      args.top_p < 1 ? cut_before(args, row, segment, kLevels).prefix : kLastSampleKey;
  const float most = logit_of(best);
  Sums own{}, total;
  for_segment(args, row, segment, [&](int64_t, float logit) {
    add(own, sums_of(engine::relative_probability(logit - most, args.temperature), last_key));
  });
  sums_before(own, &total);
  if (threadIdx.x == 0) args.sums[blockIdx.x] = total;
}

// The token at which the weights of the nucleus pass the draw, in every thread of the block.
__device__ int32_t drawn_token(const SampleArgs& args, int row, float most) {
  // Of the tokens with the last key, the first `ties` belong to the nucleus.
  unsigned last_key = kLastSampleKey, ties = ~0u;
  if (args.top_p < 1) {
    const Cut cut = args.cuts[int64_t{row} * kLevels + kLevels - 1];
    last_key = cut.prefix;
    const Sum64 weight = engine::sample_weight(engine::relative_probability_of(last_key));
    ties = static_cast<unsigned>((cut.target - cut.above + weight - 1) / weight);
  }
  const Sum64 tie_weight = engine::sample_weight(engine::relative_probability_of(last_key));
  const auto weight_of = [&](const Sums& sums) {
    return sums.above + tie_weight * min(sums.ties, ties);
  };
  const uint2 seed = args.seeds[row];
  const uint64_t random = engine::random_bits(uint64_t{seed.y} << 32 | seed.x, args.positions[row]);
  const auto draw = [&](const Sums& total) {
    return engine::scaled_random(random, weight_of(total));
  };
  const Sums* const segments = args.sums + int64_t{row} * args.segments;
  const Crossing segment = find_crossing(
      args.segments, [&](int i) { return segments[i]; },
      [&](const Sums& sums, const Sums& total) { return weight_of(sums) > draw(total); });
  const Sum64 drawn = draw(segment.total);
  const int64_t first = int64_t{segment.item} * kSegment;
  const Crossing token = find_crossing(
      static_cast<int>(min(int64_t{kSegment}, args.vocab - first)),
      [&](int i) {
        const float below = logit_of(args, row, first + i) - most;
        return sums_of(engine::relative_probability(below, args.temperature), last_key);
      },
      [&](Sums sums, const Sums&) {
        add(sums, segment.before);
        return weight_of(sums) > drawn;
      });
  return static_cast<int32_t>(first + token.item);
}

// grid (M)
__global__ void sample_pick_kernel(const SampleArgs args) {
  wait_for_previous_kernel();
  const int row = blockIdx.x;
  const Sum64 best = best_of_row(args, row);
  const bool bad = is_bad(best);
  int32_t id = token_of(best);
  if (!bad && args.temperature > 0) id = drawn_token(args, row, logit_of(best));
  if (threadIdx.x != 0) return;
  if (bad) *args.fault = {true, id, logit_of(args, row, id)};
  args.ids[row] = bad ? 0 : id;
  if (args.log != nullptr) args.log[*args.cursor % args.log_rows * args.rows + row] = bad ? -1 : id;
  if (!bad && args.seen != nullptr)
    args.seen[row * args.seen_bytes + id / 8] |= static_cast<uint8_t>(1 << id % 8);
}

int64_t segments_of(int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }

}  // namespace

int64_t sample_scratch_bytes(int64_t rows, int64_t vocab) {
  return rows * (kBins * int64_t{sizeof(Sum64)} + kLevels * int64_t{sizeof(Cut)} +
                 segments_of(vocab) * int64_t{sizeof(Sum64) + sizeof(Sums)});
}

void CudaBackend::do_sample(const Tensor& ids, const Tensor& logits, const SampleRows& rows,
                            const SampleSpec& spec, const Tensor& scratch) {
  const int64_t m = logits.dim(0), v = logits.dim(1), segments = segments_of(v);
  if (m == 0) return;
  Sum64* const bins = static_cast<Sum64*>(scratch.raw());
  Sum64* const best = bins + m * kBins;
  Sums* const sums = reinterpret_cast<Sums*>(best + m * segments);
  const float temperature = static_cast<float>(spec.temperature);
  const bool nucleus = temperature > 0 && spec.top_p < 1;
  const SampleArgs args{.ids = ids.data<int32_t>(),
                        .log = rows.log.data<int32_t>(),
                        .seen = rows.seen.data<uint8_t>(),
                        .best = best,
                        .bins = nucleus ? bins : nullptr,
                        .cuts = reinterpret_cast<Cut*>(sums + m * segments),
                        .sums = sums,
                        .fault = logit_fault_.get(),
                        .logits = logits.data<float>(),
                        .seeds = static_cast<const uint2*>(rows.seeds.raw()),
                        .positions = rows.positions.data<int32_t>(),
                        .cursor = rows.cursor.data<int32_t>(),
                        .vocab = v,
                        .seen_bytes = (v + 7) / 8,
                        .log_rows = rows.log.defined() ? rows.log.dim(0) : 0,
                        .rows = static_cast<int>(m),
                        .segments = static_cast<int>(segments),
                        .penalty = static_cast<float>(spec.repetition_penalty),
                        .temperature = temperature,
                        .top_p = spec.top_p};
  const LaunchShape each_segment{static_cast<unsigned>(m * segments), kThreads};
  LaunchShape best_of_segments = each_segment;
  best_of_segments.early = starts_early(m);
  launch(stream_, best_of_segments, sample_best_kernel, args);
  if (nucleus) {
    launch(stream_, each_segment, sample_histogram_kernel<0>, args);
    launch(stream_, each_segment, sample_histogram_kernel<1>, args);
    launch(stream_, each_segment, sample_histogram_kernel<2>, args);
  }
  if (temperature > 0) launch(stream_, each_segment, sample_sums_kernel, args);
  // Behind other kernels than `best`, which let none start early, it could not.
  const bool early = temperature == 0 && starts_early(m);
  launch(stream_, {static_cast<unsigned>(m), kThreads, 0, early}, sample_pick_kernel, args);
}

}  // namespace bbb::cuda
