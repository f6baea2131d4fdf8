// StreamSet: the streams of the block phase, and the batches that training takes from them.
//
//   full()     stream_0, in full precision; of a method that does not train, the only stream: that
//              of the quantized model
//   stage(t)   the output of the blocks before, as trained in stage t
//   target()   y; with --input-stream same it is full(), overwritten
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "data/text.h"
#include "models/config.h"
#include "train/recipe.h"
#include "train/stream_store.h"

namespace bbb::train {

class StreamSet {
 public:
  static StreamShape shape(const engine::Backend& backend, const models::LlamaConfig& model,
                           const TrainConfig& config);
  // This rank's windows: for training, and all, with those for validation if blocks train.
  static int64_t samples(const TrainConfig& config);
  static int64_t rows(const TrainConfig& config);
  static int64_t count(const TrainConfig& config);
  // Rings that training uses at once: one for each input stream, one for the target.
  static int rings(const TrainConfig& config);

  // The references, except plan, must outlive the set.
  StreamSet(engine::Backend& backend, const models::LlamaConfig& model, const TrainConfig& config,
            const StreamPlan& plan);

  Stream& full() { return *streams_[0]; }
  Stream& stage(size_t t, size_t precision = 0) {
    return *streams_[1 + t * precisions() + precision];
  }
  size_t precisions() const { return Recipe::precisions(config_); }
  Stream& target() { return *target_; }
  // The input streams of stage t: its steps take them in rotation; or, of several precisions, each
  // step takes all.
  std::vector<Stream*> inputs(size_t t) const;

  // full() and every stage(t) become the embeddings of the training and then the validation
  // windows. Keeps their first keys.
  void embed(const engine::Tensor& table, const data::Windows& windows);
  // out = change(in, their first keys), batch by batch; out may be in.
  template <typename Change>
  void rewrite(Stream& out, Stream& in, const Change& change) {
    Reader reader = in_order(in, 0, 0, rows_);
    Writer writer(backend_, out, ring(1));
    for (int64_t row = 0; row < rows_; row += batch())
      writer.write(
          row, change(as_windows(reader.next()), first_key(row, std::min(batch(), rows_ - row))));
    writer.finish();
  }
  // Reads rows [begin, end) in order.
  Reader in_order(Stream& stream, size_t ring_index, int64_t begin, int64_t end);
  int64_t rows() const { return rows_; }
  int64_t batch() const { return own_batch(config_); }          // windows at once
  engine::Tensor as_windows(const engine::Tensor& rows) const;  // (n, T, D)
  // The attention's, I32 (count, T), of rows [row, row + count); undefined without --pack
  // documents.
  engine::Tensor first_key(int64_t row, int64_t count) const;

  // This rank's batch of a recorded step: input, act (batch, T, D), and target. If the stream is on
  // the device, the step gathers the batch itself, by `order` and `cursor`. Otherwise StepFeed puts
  // it into the ring's batch tensor.
  engine::Tensor step_input(const Stream& stream, size_t ring_index, const engine::Tensor& order,
                            const engine::Tensor& cursor);
  engine::Rows step_target(size_t ring_index, const engine::Tensor& order,
                           const engine::Tensor& cursor);
  engine::Tensor step_first_key(const engine::Tensor& order, const engine::Tensor& cursor);

 private:
  friend class StepFeed;
  Ring* ring(size_t index) const { return index < rings_.size() ? rings_[index].get() : nullptr; }

  engine::Backend& backend_;
  const models::LlamaConfig& model_;
  const TrainConfig& config_;
  const int64_t rows_;
  std::vector<std::unique_ptr<Ring>> rings_;  // none if every stream is on the device
  std::vector<std::unique_ptr<Stream>> store_;
  std::vector<Stream*> streams_;
  Stream* target_ = nullptr;
  engine::Tensor first_key_;  // I32 (rows, T), always on the device
};

// Feeds the steps [begin, end) of a stage with batches from streams that are not on the device.
class StepFeed {
 public:
  // order: the stream rows of all steps.
  StepFeed(StreamSet& streams, size_t stage, const std::vector<int32_t>& order, int64_t begin,
           int64_t end);
  void next(int64_t step);  // before step `step`; call it for every step, in order

 private:
  std::vector<std::unique_ptr<Reader>> inputs_;  // null: on the device, the step gathers
  std::unique_ptr<Reader> target_;               // null likewise
  bool together_ = false;                        // a step takes all inputs, not one in rotation
};

}  // namespace bbb::train
