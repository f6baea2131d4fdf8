// What every test shares: the device under test, its CPU oracle, and comparisons.
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

// Normal values times scale; a bf16 run and its oracle must see the same ones: round_bf16 first.
std::vector<double> normal(engine::Rng& rng, int64_t n, double scale = 1.0);
std::vector<double> round_bf16(std::vector<double> values);

// ||a - b|| / ||b||; infinite where NaN or Inf stand in different places.
double relative_error(const std::vector<double>& a, const std::vector<double>& b);
double epsilon_of(DType dtype);  // bf16 2^-8, F32 2^-23, F64 2^-52

// An output with poisoned guard bytes on both sides; check() says whether any was touched.
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

// The folder of the goldens, so that a copied binary finds them: BBB_GOLDENS; else goldens/ beside
// the binary, tests/goldens beside its folder, or that of the source that it was built from,
// whichever exists.
std::string golden_folder();

// False, after saying that the test is skipped, where the device under test is no GPU: for tests of
// what only a GPU does.
bool needs_cuda();

// Texts and models that a bare machine may lack: the path, or "" after saying so, upon which
// the test returns and counts as skipped. Looked up in BBB_DATA (else ../shared/data beside the
// source) and BBB_DEMO (else demo/ in the source).
std::string data_file(const std::string& name);
std::string demo_model();

}  // namespace bbb::tests
