// The parameters that training changes. Masters, gradients and both moments are one flat buffer
// each, over all parameters, so that quantizing, gradient norm and optimizer are one pass each.
//
// Parameters may be sharded over the ranks of a Comm: then the flat buffers hold this rank's part
// of each, and all of the others.
//
//   whole    p0 p1 .. p6 n0 n1 p7 ..       every parameter, padded to kTileAlign: as it is saved
//   parts    p0 = part of rank 0 | part of rank 1 | ..     equal, multiples of kTileAlign
//   flat     own part of p0, p1 .. p6, p7 .. | n0 n1 ..    sharded parameters first
//
// The gradient of a sharded parameter is whole until its ranks have reduced it: it is in one of two
// buffers, which neighbours in the order of declaration take in turn.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/backend.h"
#include "engine/comm.h"

namespace bbb::autograd {

using engine::Backend;
using engine::Shape;
using engine::Tensor;

struct Parameter {
  std::string name;
  Tensor master;  // real; undefined if the parameter is sharded
  // master's shape, dtype by the set's GradientPasses, real if sharded. Of a quantized parameter:
  // dL/dW^, clipped elements included.
  Tensor grad;
  int64_t slot = 0;  // its row in every table of the set
  quant::SlotRule<double> rule = {};
  // No step moves it. If set before allocate(), it has no moments; if later, they and its gradient
  // are 0.
  bool frozen = false;
  bool sharded = false;  // set it before allocate()
  // finish_backward() computes the gradient from another parameter's, which is averaged already.
  bool derived = false;
  // If set, called in every backward pass as soon as it has added to `grad` what it adds there.
  // Only of weights whose products write `grad`.
  std::function<void()> on_gradient = nullptr;
};

// The backward passes of one optimizer step. One: gradients are act, half the bytes and rounded
// once. Several: gradients are added as real; act would lose the digits of the smaller summand.
enum class GradientPasses { One, Several };

// How the moments are stored. Wide: the first as act, the second as real. EightBits: both in blocks
// of quant/moments.h.
enum class Moments { Wide, EightBits };

class ParameterSet {
 public:
  // comm: null, or that of the ranks over which parameters may be sharded; it must outlive the set.
  ParameterSet(Backend& backend, GradientPasses passes, engine::Comm* comm = nullptr,
               Moments moments = Moments::Wide)
      : backend_(backend), passes_(passes), comm_(comm), moments_(moments) {}

  // Declare every parameter, then allocate() once. The reference stays valid. The optimizer uses
  // the rate lr = lr_factor times its own, and decays the parameter by lr * decay per step.
  Parameter& add(std::string name, Shape shape, quant::SlotRule<double> rule = {});
  void allocate();

  Backend& backend() const { return backend_; }
  engine::Comm* comm() const { return comm_; }  // null: nothing is sharded
  std::vector<std::unique_ptr<Parameter>>& parameters() { return parameters_; }
  // Flat, each parameter padded to kTileAlign; those without moments are the last ones.
  const Tensor& masters() const { return masters_; }
  const Tensor& grads() const { return grads_; }
  // What a step moves: the first elements of masters and gradients, as many as there are moments.
  Tensor moved(const Tensor& flat) const { return flat.slice(0, moved_elements_); }
  int64_t moved_elements() const { return moved_elements_; }
  // act: a mean over about ten steps, of Muon a sum over twenty. A step moves it by a tenth or a
  // twentieth, so rounding cannot freeze it, and the rounding error is below the noise of a
  // gradient.
  const Tensor& m() const { return m_; }
  const Tensor& v() const { return v_; }  // real: a step changes less than half an ulp of act
  Tensor moment_slice(const Tensor& moments, int64_t begin, int64_t count) const;
  const engine::ParameterTable& table() const { return table_; }
  int64_t offset(const Parameter& parameter) const;  // of its first element in a flat buffer
  void reset_moments();

  // Elements [begin, begin + count) of the flat buffers, which one call of an op takes: those of
  // one sharded parameter, those of all others, or without sharding all that a step moves.
  struct Section {
    int64_t begin, count;
    engine::ParameterTable table;
    const Parameter* sharded;  // null: not of a sharded parameter
  };
  const std::vector<Section>& sections() const { return sections_; }
  int64_t sharded_elements() const { return sharded_elements_; }  // of a flat buffer

  // Elements [begin, end) of a parameter that this rank holds: all, or of a sharded one perhaps
  // none.
  struct Range {
    int64_t begin, end;
  };
  Range own_range(const Parameter& parameter) const;

  // --- of a sharded parameter ---
  int64_t part(const Parameter& parameter) const;  // elements
  // All parts of its gradient, and padding behind it that is 0 after clear_padding().
  Tensor gradient_parts(const Parameter& parameter) const;
  void clear_padding(const Parameter& parameter) const;
  Tensor own_part(const Tensor& flat, const Parameter& parameter) const {
    return flat.slice(offset(parameter), part(parameter));
  }
  // real: one of the gradient buffers, free outside of backward passes.
  const Tensor& spare_buffer() const { return gradient_buffers_[0]; }
  // `count` elements in all from equal parts of each rank. Every rank calls it. The result is in
  // a gradient buffer: use it before the next call, and not within a step.
  Tensor gather(const Tensor& part, int64_t count) const;

  // --- buffers as they are saved ---
  int64_t whole_entries(const Tensor& flat) const {
    return sharded_elements_ == 0 ? flat.numel() : entries(flat, whole_elements_);
  }
  // Calls take(piece) with the pieces of the whole buffer, in order. Every rank calls it.
  void visit_whole(const Tensor& flat, const std::function<void(const Tensor& piece)>& take) const;
  // The other way: uploads what this rank holds of a whole buffer on the host.
  void upload_whole(const Tensor& flat, const void* whole) const;

 private:
  void allocate_sections(const std::vector<int64_t>& counts);
  int64_t entries(const Tensor& flat, int64_t elements) const;  // of a flat buffer

  Backend& backend_;
  GradientPasses passes_;
  engine::Comm* comm_;
  Moments moments_;
  std::vector<std::unique_ptr<Parameter>> parameters_;
  std::vector<Shape> shapes_;
  std::vector<int64_t> offsets_;        // in a flat buffer
  std::vector<int64_t> whole_offsets_;  // in a whole one
  int64_t moved_elements_ = 0, sharded_elements_ = 0, whole_elements_ = 0;
  Tensor masters_, grads_, m_, v_;
  Tensor gradient_buffers_[2];  // real: of sharded parameters
  engine::ParameterTable table_;
  std::vector<Section> sections_;
};

}  // namespace bbb::autograd
