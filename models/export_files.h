// ExportFiles: the files of one export format, from the first tensor to the last comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "models/packed_checkpoint.h"

namespace bbb::models {

using Formats = std::function<std::vector<quant::LinearFormat>(int64_t layer)>;

// What an export is made from.
struct ExportSource {
  const Checkpoint& model;
  const data::Tokenizer& tokenizer;
  const Formats& formats;
  const std::string& bbb_json;
  int64_t max_shard_bytes;
};

class ExportFiles {
 public:
  virtual ~ExportFiles() = default;  // removes what was not committed
  // The embedding, the layers in order, the other weights outside of the layers, then finish().
  virtual void add_outer(const OuterWeight& weight, const std::vector<float>& values) = 0;
  virtual void add_layer(int64_t index, const LayerResult& layer) = 0;
  virtual void finish() = 0;
  // Read back: throw, naming the tensor, unless the file holds what was given, rounded only as the
  // format says.
  virtual void check_outer(const OuterWeight& weight, const std::vector<float>& values) = 0;
  virtual void check_layer(int64_t index, const LayerResult& layer) = 0;
  virtual double bits_per_weight() const = 0;
  virtual void commit() = 0;  // renames the files into place

  const LargestRounding& rounding() const { return rounding_; }

 protected:
  // `weight`: of the packed model.
  void add_rounding(const std::string& name, const std::vector<float>& weight,
                    const std::vector<float>& read) {
    for (size_t i = 0; i < weight.size(); ++i)
      if (const float difference = std::fabs(weight[i] - read[i]);
          difference > rounding_.difference)
        rounding_ = {difference, name};
  }

 private:
  LargestRounding rounding_;
};

// Throw, saying what, if the format cannot hold the model.
std::unique_ptr<ExportFiles> make_directory_export(const std::string& directory,
                                                   const ExportSource& source,
                                                   const ExportOptions& options);
std::unique_ptr<ExportFiles> make_gguf_export(const std::string& path, const ExportSource& source,
                                              GgufTables tables);

inline bool is_table(const OuterWeight& weight) { return weight.shape.size() == 2; }
std::vector<uint16_t> to_bf16(const std::vector<float>& values);
std::vector<float> rounded_bf16(std::vector<float> values);

}  // namespace bbb::models
