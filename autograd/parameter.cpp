#include "autograd/parameter.h"

#include <utility>

namespace bbb::autograd {

namespace {
constexpr int64_t kAlignElements = 64;  // every parameter starts on a 256-byte boundary
}

Parameter& ParameterSet::add(std::string name, Shape shape) {
  BBB_ASSERT(!masters_.defined());
  parameters_.push_back(std::make_unique<Parameter>());
  parameters_.back()->name = std::move(name);
  shapes_.push_back(std::move(shape));
  return *parameters_.back();
}

void ParameterSet::allocate() {
  BBB_ASSERT(!masters_.defined());
  std::vector<int64_t> offsets;
  int64_t total = 0;
  for (const Shape& shape : shapes_) {
    offsets.push_back(total);
    const int64_t n = engine::numel_of(shape);
    total += (n + kAlignElements - 1) / kAlignElements * kAlignElements;
  }
  // Zeros, so that the padding is and stays 0 under every pass over the whole buffer.
  for (Tensor* buffer : {&masters_, &grads_, &m_, &v_})
    *buffer = backend_.zeros({total}, backend_.real());
  for (size_t i = 0; i < shapes_.size(); ++i) {
    const int64_t n = engine::numel_of(shapes_[i]);
    parameters_[i]->master = masters_.slice(offsets[i], n).view(shapes_[i]);
    parameters_[i]->grad = grads_.slice(offsets[i], n).view(shapes_[i]);
  }
}

void ParameterSet::reset_moments() {
  backend_.zero(m_);
  backend_.zero(v_);
}

}  // namespace bbb::autograd
