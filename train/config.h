// TrainConfig: everything that decides what a training run computes, and its defaults.
#pragma once

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "engine/tensor.h"
#include "models/config.h"
#include "models/recompute.h"

namespace bbb::train {

// One stage of the block phase: the bit widths of weights and activations. activation_bits must be
// 16.
struct Stage {
  int weight_bits = 2;
  int activation_bits = 16;
  bool operator==(const Stage&) const = default;
  friend std::ostream& operator<<(std::ostream& out, const Stage& s) {
    return out << "w" << s.weight_bits << "a" << s.activation_bits;
  }
};

// config_table.h has the words of each enumeration, in the order of its enumerators.
//
// The input stream of stage t. Same: its own. Higher: that of the stage before. Mix: both in
// rotation.
enum class InputStream { Same, Higher, Mix };
enum class EndToEndLoss { Kl, CrossEntropy, JensenShannon };
enum class EndToEndTrain { Scales, All };  // All: the blocks' linears and norms
enum class Snap { Auto, On, Off };         // moves masters to the middle of their bins at the start
// Timed: measures which algorithm of a matrix product is the fastest. Two runs may then differ in
// the last bits. Heuristic: takes the library's first suggestion.
enum class GemmAlgorithms { Timed, Heuristic };

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
  // For both phases; empty: each phase keeps as many activations as fit.
  std::optional<models::Recompute> recompute;
};

struct TrainConfig {
  std::string model;
  std::string data;
  std::string out;

  std::vector<Stage> stages;  // empty: no block phase, end to end from round to nearest
  int bits = 0;               // of the result; 0: the last stage's, or 2
  int group = 32;

  int64_t samples = 1024;
  int64_t seq_len = 2048;
  int64_t val_samples = 64;
  int64_t epochs = 2;
  int64_t batch = 8;
  std::vector<double> lr;  // per stage, or one for all; empty: by model width and stage
  InputStream input_stream = InputStream::Same;
  uint64_t seed = 0;

  int64_t e2e_steps = 0;  // 0: no end-to-end phase
  int64_t e2e_batch = 16;
  int64_t e2e_micro_batch = 0;  // windows that go through the model at once; 0: by device
  EndToEndLoss e2e_loss = EndToEndLoss::Kl;
  double e2e_jsd_beta = 0.5;  // of JensenShannon: the teacher's share of the mixture
  EndToEndTrain e2e_train = EndToEndTrain::All;
  double e2e_lr = 0;  // 0: by model width, e2e_train and whether blocks are trained
  Snap e2e_snap = Snap::Auto;

  std::optional<int32_t> doc_end;  // token id; empty: the vocabulary's own end of document
  int64_t save_every = 0;          // steps between saved states; 0: by the clock
  int threads = 0;                 // 0: all cores
  GemmAlgorithms gemm_algorithms = GemmAlgorithms::Timed;  // on the CPU always Heuristic
  MemoryBudget memory;
  std::optional<RunLength> extrapolate;  // after the blocks, report the time of such a run
};

// "w8a16,w4a16,w2a16". Throws UsageError on anything else.
std::vector<Stage> parse_stages(const std::string& text);
std::string to_string(const std::vector<Stage>& stages);
// "auto", "none", "attention", "block".
std::optional<models::Recompute> parse_recompute(const std::string& text);

// Converts to indented JSON, and back: all fields except out, memory and extrapolate, which do not
// decide the result. `where`: the file, for error messages.
std::string to_json(const TrainConfig& config);
TrainConfig config_from_json(const std::string& json, const std::string& where);

// Throws UsageError, naming the linear, if the group does not divide its input features.
void check_group_size(const models::LlamaConfig& model, int group);
// Fills in every default. Throws UsageError, naming the option, if a value is impossible.
TrainConfig resolve(TrainConfig config, const models::LlamaConfig& model,
                    engine::DeviceType device);

}  // namespace bbb::train
