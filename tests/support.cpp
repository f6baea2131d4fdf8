#include "tests/support.h"

#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <limits>

#include "engine/bf16.h"

namespace bbb::tests {
namespace {

constexpr uint8_t kPoison = 0xa5;

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// Prints to std::cout, which the report stores with the test; scripts/test.sh counts it as skipped.
std::string existing(const std::string& path) {
  if (std::filesystem::exists(path)) return path;
  std::cout << "SKIPPED: " << path << " is absent\n";
  return "";
}

}  // namespace

bool on_cuda() { return environment("BBB_DEVICE") == "cuda"; }

Backend& backend() {
  static const std::unique_ptr<Backend> made = [] {
    return on_cuda() ? engine::make_cuda_backend(0) : engine::make_cpu_backend(0);
  }();
  return *made;
}

Backend& oracle() {
  static const std::unique_ptr<Backend> made = engine::make_cpu_backend(0);
  return *made;
}

Backend& oracle_f64() {
  static const std::unique_ptr<Backend> made = engine::make_cpu_f64_backend(0);
  return *made;
}

Tensor make(Backend& backend, const Shape& shape, DType dtype, const std::vector<double>& values) {
  Tensor t = backend.empty(shape, dtype);
  BBB_ASSERT(t.numel() == static_cast<int64_t>(values.size()));
  const auto upload = [&](auto convert) {
    std::vector<decltype(convert(0.0))> host;
    host.reserve(values.size());
    for (const double v : values) host.push_back(convert(v));
    backend.upload(t, host.data());
  };
  switch (dtype) {
    case DType::F64:
      upload([](double v) { return v; });
      break;
    case DType::F32:
      upload([](double v) { return static_cast<float>(v); });
      break;
    case DType::BF16:
      upload([](double v) { return engine::to_bf16(v); });
      break;
    case DType::I32:
      upload([](double v) { return static_cast<int32_t>(v); });
      break;
    case DType::U8:
      upload([](double v) { return static_cast<uint8_t>(v); });
      break;
  }
  return t;
}

Tensor make_ids(Backend& backend, const Shape& shape, const std::vector<int32_t>& ids) {
  Tensor t = backend.empty(shape, DType::I32);
  BBB_ASSERT(t.numel() == static_cast<int64_t>(ids.size()));
  backend.upload(t, ids.data());
  return t;
}

Tensor make_bytes(Backend& backend, const Shape& shape, const std::vector<uint8_t>& bytes) {
  Tensor t = backend.empty(shape, DType::U8);
  BBB_ASSERT(t.numel() == static_cast<int64_t>(bytes.size()));
  backend.upload(t, bytes.data());
  return t;
}

std::vector<double> values_of(Backend& backend, const Tensor& tensor) {
  std::vector<double> values;
  values.reserve(static_cast<size_t>(tensor.numel()));
  const auto fetch = [&](auto zero, auto convert) {
    std::vector<decltype(zero)> host(static_cast<size_t>(tensor.numel()));
    backend.download(host.data(), tensor);
    for (const auto v : host) values.push_back(convert(v));
  };
  const auto plain = [](auto v) { return static_cast<double>(v); };
  switch (tensor.dtype()) {
    case DType::F64:
      fetch(double{}, plain);
      break;
    case DType::F32:
      fetch(float{}, plain);
      break;
    case DType::BF16:
      fetch(uint16_t{}, engine::from_bf16);
      break;
    case DType::I32:
      fetch(int32_t{}, plain);
      break;
    case DType::U8:
      fetch(uint8_t{}, plain);
      break;
  }
  return values;
}

std::vector<uint8_t> bytes_of(Backend& backend, const Tensor& tensor) {
  std::vector<uint8_t> bytes(static_cast<size_t>(tensor.bytes()));
  backend.download(bytes.data(), tensor);
  return bytes;
}

std::vector<double> normal(engine::Rng& rng, int64_t n, double scale) {
  std::vector<double> values(static_cast<size_t>(n));
  for (double& v : values) v = scale * rng.normal();
  return values;
}

std::vector<double> round_bf16(std::vector<double> values) {
  for (double& v : values) v = engine::from_bf16(engine::to_bf16(v));
  return values;
}

double relative_error(const std::vector<double>& a, const std::vector<double>& b) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (a.size() != b.size()) return kInfinity;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isfinite(a[i]) && std::isfinite(b[i])) {
      difference += (a[i] - b[i]) * (a[i] - b[i]);
      norm += b[i] * b[i];
    } else if (!(std::isnan(a[i]) && std::isnan(b[i])) && a[i] != b[i]) {
      return kInfinity;
    }
  }
  if (difference == 0) return 0;
  return norm == 0 ? kInfinity : std::sqrt(difference / norm);
}

double epsilon_of(DType dtype) {
  switch (dtype) {
    case DType::F64:
      return 0x1p-52;
    case DType::F32:
      return 0x1p-23;
    case DType::BF16:
      return 0x1p-8;
    default:
      BBB_ASSERT(!"a real dtype");
  }
}

Guarded::Guarded(Backend& backend, Shape shape, DType dtype)
    : backend_(backend), guard_bytes_(256) {
  const int64_t size = engine::size_bytes(dtype), guard = guard_bytes_ / size;
  const int64_t numel = engine::numel_of(shape);
  whole_ = backend.empty({guard + numel + guard}, dtype);
  const std::vector<uint8_t> poison(static_cast<size_t>(whole_.bytes()), kPoison);
  backend.upload(whole_, poison.data());
  tensor_ = whole_.slice(guard, numel).view(std::move(shape));
}

bool Guarded::untouched() const {
  const std::vector<uint8_t> bytes = bytes_of(backend_, whole_);
  for (int64_t i = 0; i < guard_bytes_; ++i)
    if (bytes[static_cast<size_t>(i)] != kPoison ||
        bytes[bytes.size() - 1 - static_cast<size_t>(i)] != kPoison)
      return false;
  return true;
}

TempDir::TempDir() {
  std::string name = (std::filesystem::temp_directory_path() / "bbb-test-XXXXXX").string();
  BBB_CHECK(mkdtemp(name.data()) != nullptr, "cannot make a directory like ", name);
  path_ = name;
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string golden_folder() {
  namespace fs = std::filesystem;
  const std::string given = environment("BBB_GOLDENS");
  if (!given.empty()) return given;
  const std::string here = fs::read_symlink("/proc/self/exe").parent_path().string();
  for (const std::string& folder : {here + "/goldens", here + "/../tests/goldens"})
    if (fs::is_directory(folder)) return folder;
  return BBB_SOURCE_DIR "/tests/goldens";
}

bool needs_cuda() {
  if (!on_cuda()) std::cout << "SKIPPED: only a GPU does this\n";
  return on_cuda();
}

std::string data_file(const std::string& name) {
  const std::string folder = environment("BBB_DATA");
  return existing((folder.empty() ? BBB_SOURCE_DIR "/../shared/data" : folder) + "/" + name);
}

std::string demo_model() {
  const std::string folder = environment("BBB_DEMO");
  return existing((folder.empty() ? BBB_SOURCE_DIR "/demo" : folder) +
                  "/SmolLM2-135M-Instruct.Q4_1.gguf");
}

}  // namespace bbb::tests
