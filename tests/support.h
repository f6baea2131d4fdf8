// Shared by all tests: the device under test, its CPU oracle, and comparisons.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/backend.h"
#include "engine/rng.h"

namespace bbb::tests {

using engine::Backend;
using engine::DType;
using engine::Shape;
using engine::Tensor;

bool on_cuda();         // BBB_DEVICE=cuda
Backend& backend();     // the device under test, made once
Backend& oracle();      // CpuBackend<float>
Backend& oracle_f64();  // CpuBackend<double>

// Host values as a tensor of `dtype` (real types are rounded to nearest even), and back.
Tensor make(Backend& backend, const Shape& shape, DType dtype, const std::vector<double>& values);
Tensor make_ids(Backend& backend, const Shape& shape, const std::vector<int32_t>& ids);
Tensor make_bytes(Backend& backend, const Shape& shape, const std::vector<uint8_t>& bytes);
std::vector<double> values_of(Backend& backend, const Tensor& tensor);
std::vector<uint8_t> bytes_of(Backend& backend, const Tensor& tensor);

// Normal values times scale. Round them by round_bf16 if a bf16 run and its oracle must get the
// same values.
std::vector<double> normal(engine::Rng& rng, int64_t n, double scale = 1.0);
std::vector<double> round_bf16(std::vector<double> values);

// ||a - b|| / ||b||; infinite if NaN or Inf are at different positions.
double relative_error(const std::vector<double>& a, const std::vector<double>& b);
double epsilon_of(DType dtype);  // bf16 2^-8, F32 2^-23, F64 2^-52

// An output with poisoned guard bytes on both sides. untouched(): nothing overwrote them.
class Guarded {
 public:
  Guarded(Backend& backend, Shape shape, DType dtype);
  const Tensor& tensor() const { return tensor_; }
  bool untouched() const;

 private:
  Backend& backend_;
  Tensor whole_, tensor_;
  int64_t guard_bytes_;
};

// A directory removed at the end of the test.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// The folder of the goldens: BBB_GOLDENS, else the first that exists of goldens/ next to the
// binary, tests/goldens next to its folder, and tests/goldens of the source tree. A copied binary
// finds them this way.
std::string golden_folder();

// Whether the device under test is a GPU. If not, prints that the test is skipped. For tests of
// what only a GPU does.
bool needs_cuda();

// The path of a text or model that a machine may lack. If it is absent, prints so and returns "";
// the test then returns and counts as skipped. Looked up in BBB_DATA (else ../shared/data next to
// the source) and BBB_DEMO (else demo/ in the source).
std::string data_file(const std::string& name);
std::string demo_model();

}  // namespace bbb::tests
