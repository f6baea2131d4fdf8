// Tensor: a contiguous, row-major view of a shared buffer. No strides.
//
// Copying a Tensor copies the handle. view(), rows() and slice() share the buffer.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "quant/check.h"

namespace bbb::engine {

enum class DType : uint8_t { F64, F32, BF16, I32, U8 };
enum class DeviceType : uint8_t { Cpu, Cuda };
using Shape = std::vector<int64_t>;

int64_t size_bytes(DType dtype);
const char* name_of(DType dtype);
std::string to_string(const Shape& shape);  // "(2, 3)"
int64_t numel_of(const Shape& shape);       // throws on a negative size or an overflow

// Owns device or host memory; the destructor calls `release`.
class Storage {
 public:
  Storage(void* data, int64_t bytes, std::function<void()> release)
      : data_(data), bytes_(bytes), release_(std::move(release)) {}
  ~Storage() {
    if (release_) release_();
  }
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_;
  int64_t bytes_;
  std::function<void()> release_;
};

class Tensor {
 public:
  Tensor() = default;
  Tensor(std::shared_ptr<Storage> storage, int64_t offset_bytes, Shape shape, DType dtype,
         DeviceType device);

  bool defined() const { return storage_ != nullptr; }
  const Shape& shape() const { return shape_; }
  int rank() const { return static_cast<int>(shape_.size()); }
  int64_t dim(int i) const;  // negative counts from the end
  int64_t numel() const { return numel_; }
  int64_t bytes() const { return numel_ * size_bytes(dtype_); }
  DType dtype() const { return dtype_; }
  DeviceType device() const { return device_; }

  void* raw() const;  // nullptr for an undefined tensor
  // The elements as T, whose size must be the dtype's. BF16 is uint16_t on the host.
  template <typename T>
  T* data() const {
    BBB_ASSERT(!defined() || sizeof(T) == static_cast<size_t>(size_bytes(dtype_)));
    return static_cast<T*>(raw());
  }

  Tensor view(Shape shape) const;                    // same number of elements
  Tensor rows(int64_t begin, int64_t count) const;   // [begin, begin + count) of dimension 0
  Tensor slice(int64_t begin, int64_t count) const;  // flat elements, rank 1

 private:
  std::shared_ptr<Storage> storage_;
  int64_t offset_bytes_ = 0;
  Shape shape_;
  int64_t numel_ = 0;
  DType dtype_ = DType::F32;
  DeviceType device_ = DeviceType::Cpu;
};

}  // namespace bbb::engine
