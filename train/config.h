// TrainConfig: everything that decides what a training run computes, and its defaults.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "autograd/muon.h"
#include "data/text.h"
#include "engine/comm.h"
#include "engine/tensor.h"
#include "models/config.h"
#include "models/recompute.h"
#include "models/site_statistics.h"

namespace bbb::train {

// The bit widths of weights and activations that train together.
struct Stage {
  int weight_bits = 2;
  int activation_bits = 16;
  bool operator==(const Stage&) const = default;
  friend std::ostream& operator<<(std::ostream& out, const Stage& s) {
    return out << "w" << s.weight_bits << "a" << s.activation_bits;
  }
};

// A stage of the end-to-end phase: widths, and passes over the samples.
struct ModelStage : Stage {
  int64_t passes = 1;
  bool operator==(const ModelStage&) const = default;
  friend std::ostream& operator<<(std::ostream& out, const ModelStage& s) {
    return out << static_cast<const Stage&>(s) << ":" << s.passes;
  }
};

// config_table.h has the words of each enumeration, in the order of its enumerators.
//
// The input stream of stage t. Same: its own. Higher: that of the stage before. Mix: both in
// rotation.
enum class InputStream { Same, Higher, Mix };
// What a block is to reproduce. Full: its full-precision output on the full-precision stream, which
// corrects the error of the blocks before it. Follow: that on its own input.
enum class Target { Full, Follow };
// All: block by block. Stochastic, Prefix: the whole model end to end, and a stage switches only
// some blocks to its widths: drawn, with a bias to the first ones, or the first ones (Algorithm 2).
enum class BlockSchedule { All, Stochastic, Prefix };
enum class Rotate { None, Group };
// The grid of weights (quant/spec.h), and LC's affine map: A = 1 / sigma, a fixed orthonormal
// matrix / sigma, or one that starts there and trains.
enum class Quantizer { MinMax, Seq, Lc };
enum class LcMap { Scalar, Orthonormal, Learned };
enum class SplitSideChoice { Weight, Activation, Auto };
using data::Packing;
using models::SplitMetric;
using quant::LcGradient;
using quant::NestedDequant;
using quant::RangeRule;
using quant::Ste;
enum class EndToEndLoss { Kl, CrossEntropy, JensenShannon };
// What the block phase does. Blocks: trains their weights. Gptq: rounds them, with the errors of
// outputs fed back (models/ldlq.h). BlockAp: trains weights, scales and zero points together
// (EfficientQAT).
enum class Method { Blocks, Gptq, BlockAp };
// What of the grid trains with the weights: of a block, ratios of the whole model, too.
enum class GridTrain { None, Scales, ScalesZeros, Ratios };
// All: the blocks' linears and norms. Auto: scales behind a method that finds codes.
enum class EndToEndTrain { Auto, Scales, All };
enum class EmbeddingTrain { Keep, Train };  // and head and final norm; only with All
enum class Freeze { None, Flips };
// How moments of the end-to-end phase are stored (autograd::Moments).
using autograd::Moments;
enum class Snap { Auto, On, Off };  // moves masters to the middle of their bins at the start
// What becomes of low-rank adapters at the end of their stage: they are added to the masters, or
// dropped.
enum class LoraEnd { Merge, Discard };
// What anchors the output of a block whose adapters train to that of the full-precision block
// (autograd::Anchor). Auto: moments.
enum class LoraMatch { Auto, None, Moments, Kl, Both };
// Timed: measures which algorithm of a matrix product is the fastest. Two runs may then differ in
// the last bits. Heuristic: takes the library's first suggestion.
enum class GemmAlgorithms { Timed, Heuristic };

// The end-to-end phase's full-precision model (train/teacher.h).
enum class TeacherStates { Beside, Cached };

// Length of a block phase: training windows, and passes over them in every stage.
struct RunLength {
  int64_t samples = 0;
  int64_t epochs = 0;
  bool operator==(const RunLength&) const = default;
  friend std::ostream& operator<<(std::ostream& out, const RunLength& length) {
    return out << length.samples << "x" << length.epochs;
  }
};

// Memory that a run may use. It decides where data is stored, never what is computed.
struct MemoryBudget {
  int64_t device_bytes = 0;  // 0: what the device has left
  int64_t host_bytes = 0;    // for streams; 0: four fifths of what the machine has left
  std::string scratch;       // directory for streams that fit in neither; "": none
  int sharers = 1;           // processes that share the memory of a CPU, the host and the scratch
  // For both phases; empty: each phase keeps as many activations as fit.
  std::optional<models::Recompute> recompute;
  std::optional<TeacherStates> teacher;  // empty: cached, if it fits
};

struct TrainConfig {
  std::string model;
  std::string data;
  std::string out;

  std::vector<Stage> stages;  // empty: no block phase, end to end from round to nearest
  int bits = 0;               // of the result's weights; 0: the last stage's, or 2
  int act_bits = 16;          // of its activations
  int group = 32;
  Quantizer quantizer = Quantizer::MinMax;
  LcMap lc_map = LcMap::Orthonormal;
  LcGradient lc_gradient = LcGradient::Dge;
  double lc_scale_rate = 0.1;           // rate of u, v and a learned map, as a part of the latents'
  Ste ste = Ste::Clip;                  // of the masters of groups
  double ste_trust = 1;                 // distance of Trust, in half steps
  RangeRule range = RangeRule::MinMax;  // of weights
  Rotate rotate = Rotate::None;
  // Split channels: none, the mean ratio (from half of it in the first block to one and a half), or
  // the ratios of the first and the last block.
  std::vector<double> ocs_ratio;
  SplitMetric ocs_metric = SplitMetric::L2Mean;
  SplitSideChoice split_side = SplitSideChoice::Weight;
  // What the choice of bits, split channels and outliers of every input site is to cost: bits a
  // weight, or microseconds a token (train/allocation.h). At most one of them; 0: no choice.
  double target_bits = 0;
  double target_us = 0;
  RangeRule act_range = RangeRule::MinMax;
  int64_t act_outliers = 0;        // channels of every input at 8 bits, a multiple of the group
  double down_kurtosis = 0;        // down-projections above it take 4-bit activations; 0: none
  std::vector<int> any_precision;  // bits of weights that train at once, from 8 down; empty: one
  NestedDequant nested_dequant = NestedDequant::Middle;
  std::string from;  // a finished run whose result is the start; "": the model

  int64_t samples = 1024;
  int64_t seq_len = 2048;
  int64_t val_samples = 64;
  int64_t epochs = 2;
  int64_t batch = 8;
  autograd::UpdateRule optimizer = autograd::UpdateRule::AdamW;  // of the linears' masters
  int64_t lora_rank = 0;  // of adapters, which train from the second stage on; 0: none
  double lora_alpha = 1;  // W = master + alpha A B
  LoraEnd lora_end = LoraEnd::Merge;
  LoraMatch lora_match = LoraMatch::Auto;
  double lora_match_weight = 0.1;
  std::vector<double> lr;  // per stage, or one for all; empty: by model width and stage
  InputStream input_stream = InputStream::Same;
  Target target = Target::Full;
  Method method = Method::Blocks;
  GridTrain grid_train = GridTrain::None;
  double grid_lr = 1e-4;  // of learned scales, zero points and ratios
  BlockSchedule block_schedule = BlockSchedule::All;
  double first_ratio = 0.3;  // of the blocks that the first stage of Algorithm 2 switches
  double depth_bias = 1;     // its alpha: block j of B is drawn with weight (B + 1 - j)^alpha
  uint64_t seed = 0;

  static constexpr int64_t kAutoSteps = -1;
  std::vector<ModelStage> e2e_stages;  // empty: one stage of e2e_steps steps at the blocks' widths
  int64_t e2e_steps = 0;               // most steps of a stage; 0: no end-to-end phase;
                                       // kAutoSteps: those of its passes
  int64_t e2e_batch = 16;
  int64_t e2e_micro_batch = 0;  // windows that go through the model at once; 0: by device
  EndToEndLoss e2e_loss = EndToEndLoss::Kl;
  double e2e_jsd_beta = 0.5;  // of JensenShannon: the teacher's share of the mixture
  EndToEndTrain e2e_train = EndToEndTrain::Auto;
  EmbeddingTrain e2e_embedding = EmbeddingTrain::Keep;  // resolved: Keep if there is no use for it
  Moments e2e_moments = Moments::Wide;
  std::vector<double> e2e_lr;  // per stage, or one for all; empty: by model width and stage
  Snap e2e_snap = Snap::Auto;
  // Codes that oscillate (Backend::average, dampen, freeze_flips).
  double e2e_average =
      0;  // decay of a running average of the masters, which is the result; 0: none
  double e2e_damping = 0;  // 0: none
  Freeze e2e_freeze = Freeze::None;

  Packing pack = Packing::Stream;
  std::optional<int32_t> doc_end;  // token id; empty: the vocabulary's own end of document
  int64_t save_every = 0;          // steps between saved states; 0: by the clock
  int threads = 0;                 // 0: all cores
  GemmAlgorithms gemm_algorithms = GemmAlgorithms::Timed;  // on the CPU always Heuristic
  MemoryBudget memory;
  bool dry_run = false;                  // plan, time a few steps, write nothing
  std::optional<RunLength> extrapolate;  // after the blocks, report the time of such a run
  // The processes that train this run together; of a batch each takes the windows of its own slots
  // (sample_order.h). Results depend on their number by the order of sums alone.
  std::shared_ptr<engine::Comm> comm = std::make_shared<engine::Comm>();
};

// The stages of the paper's schedules A, B and C down to `to` (w2a16 or w2a2; method.md section 1).
std::vector<Stage> scheduled_stages(char schedule, const Stage& to);
// "w8a16,w4a16,w2a16". Throws UsageError on anything else.
std::vector<Stage> parse_stages(const std::string& text);
std::string to_string(const std::vector<Stage>& stages);
// "auto", "none", "attention", "block".
std::optional<models::Recompute> parse_recompute(const std::string& text);

// Converts to indented JSON, and back: all fields except out, memory, dry_run, extrapolate and
// comm, which do not decide the result. `where`: the file, for error messages.
std::string to_json(const TrainConfig& config);
TrainConfig config_from_json(const std::string& json, const std::string& where);

// Is every input site given its own bits, split channels and outliers?
bool allocates(const TrainConfig& config);
// Does the block phase leave codes, not masters?
bool finds_codes(const TrainConfig& config);
// Does the end-to-end phase train the grid with all weights? Its result is codes then, too.
bool learns_whole_grid(const TrainConfig& config);
// Does the block phase train, so that it validates?
bool trains_blocks(const TrainConfig& config);
// Do adapters train in this stage of the blocks, or of the whole model?
bool adapts_blocks(const TrainConfig& config, size_t stage);
bool adapts_whole(const TrainConfig& config, size_t stage);
// Are the weights that a stage of the whole model trains sharded over the ranks, with gradients and
// moments? Otherwise every rank has all.
bool shards_whole(const TrainConfig& config, size_t stage);
// Optimizer steps of one pass of the end-to-end phase over the samples; at least 1.
int64_t steps_per_pass(const TrainConfig& config);
// This rank's part: windows of a batch of blocks, of a step of the end-to-end phase, and of those
// that go through the model at once.
int64_t own_batch(const TrainConfig& config);
int64_t own_e2e_batch(const TrainConfig& config);
int64_t own_micro_batch(const TrainConfig& config);
// The same run on a Comm that moves nothing, to count what this rank takes.
TrainConfig without_comm(TrainConfig config);
// Fills in every default. Throws UsageError, naming the option, if a value is impossible.
TrainConfig resolve(TrainConfig config, const models::LlamaConfig& model,
                    engine::DeviceType device);

}  // namespace bbb::train
