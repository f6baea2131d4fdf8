#include "engine/tensor.h"

#include <limits>

namespace bbb::engine {

int64_t size_bytes(DType dtype) {
  switch (dtype) {
    case DType::F64:
      return 8;
    case DType::F32:
      return 4;
    case DType::BF16:
      return 2;
    case DType::I32:
      return 4;
    case DType::U8:
      return 1;
  }
  BBB_ASSERT(false);
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::F64:
      return "F64";
    case DType::F32:
      return "F32";
    case DType::BF16:
      return "BF16";
    case DType::I32:
      return "I32";
    case DType::U8:
      return "U8";
  }
  BBB_ASSERT(false);
}

std::string to_string(const Shape& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + ")";
}

int64_t numel_of(const Shape& shape) {
  int64_t n = 1;
  for (int64_t d : shape) {
    BBB_CHECK(d >= 0, "negative size in shape ", to_string(shape));
    BBB_CHECK(d == 0 || n <= std::numeric_limits<int64_t>::max() / 8 / d, "shape ",
              to_string(shape), " has too many elements");
    n *= d;
  }
  return n;
}

Tensor::Tensor(std::shared_ptr<Storage> storage, int64_t offset_bytes, Shape shape, DType dtype,
               DeviceType device)
    : storage_(std::move(storage)),
      offset_bytes_(offset_bytes),
      shape_(std::move(shape)),
      numel_(numel_of(shape_)),
      dtype_(dtype),
      device_(device) {
  BBB_ASSERT(storage_ != nullptr);
  BBB_ASSERT(offset_bytes_ >= 0 && offset_bytes_ + bytes() <= storage_->bytes());
}

int64_t Tensor::dim(int i) const {
  if (i < 0) i += rank();
  BBB_ASSERT(i >= 0 && i < rank());
  return shape_[static_cast<size_t>(i)];
}

void* Tensor::raw() const {
  return defined() ? static_cast<char*>(storage_->data()) + offset_bytes_ : nullptr;
}

Tensor Tensor::view(Shape shape) const {
  BBB_ASSERT(numel_of(shape) == numel_);
  return Tensor(storage_, offset_bytes_, std::move(shape), dtype_, device_);
}

Tensor Tensor::rows(int64_t begin, int64_t count) const {
  BBB_ASSERT(rank() >= 1 && begin >= 0 && count >= 0 && begin + count <= shape_[0]);
  Shape shape = shape_;
  shape[0] = count;
  const int64_t row = shape_[0] == 0 ? 0 : bytes() / shape_[0];
  return Tensor(storage_, offset_bytes_ + begin * row, std::move(shape), dtype_, device_);
}

Tensor Tensor::slice(int64_t begin, int64_t count) const {
  return view({numel_}).rows(begin, count);
}

}  // namespace bbb::engine
