#include "train/saved_state.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "train/run_file.h"

namespace bbb::train {
namespace {

using data::FileDType;
using data::SafeTensor;
using data::SafeTensorsWriter;
using engine::DType;
using engine::Shape;
using engine::Tensor;

constexpr const char* kPosition = "position";
constexpr const char* kValidation = "validation";

constexpr std::chrono::seconds kSaveAfter{30};
constexpr int kSaveShare = 20;

FileDType file_dtype(const Tensor& tensor) {
  switch (tensor.dtype()) {
    case DType::F64:
      return FileDType::F64;
    case DType::BF16:
      return FileDType::BF16;
    case DType::U8:
      return FileDType::U8;
    default:
      BBB_ASSERT(tensor.dtype() == DType::F32);
      return FileDType::F32;
  }
}

template <typename T>
int64_t bytes_of(const std::vector<T>& values) {
  return static_cast<int64_t>(values.size() * sizeof(T));
}

template <typename T>
std::vector<T> values_of(const SafeTensor& tensor, FileDType dtype, const std::string& where) {
  BBB_CHECK(tensor.dtype == dtype, where, ": is a ", name_of(tensor.dtype), ", but must be ",
            name_of(dtype));
  std::vector<T> values(static_cast<size_t>(tensor.numel()));
  std::memcpy(values.data(), tensor.data, static_cast<size_t>(bytes_of(values)));
  return values;
}

}  // namespace

// In a state.
static Shape shape_of(const NamedTensor& of) {
  return of.set != nullptr ? Shape{of.set->whole_entries(of.tensor)} : of.tensor.shape();
}

int64_t bytes_of(const NamedTensors& tensors) {
  int64_t bytes = 0;
  for (const NamedTensor& of : tensors)
    bytes += engine::numel_of(shape_of(of)) * engine::size_bytes(of.tensor.dtype());
  return bytes;
}

void save_state(const std::string& path, uint64_t run, const Position& position,
                engine::Backend& backend, const NamedTensors& tensors) {
  const std::vector<int64_t> where{position.block, position.stage, position.step};
  const std::vector<double>& losses = position.validation;
  std::vector<SafeTensorsWriter::Entry> entries{{kPosition, FileDType::I64, {3}}};
  if (!losses.empty())
    entries.push_back({kValidation, FileDType::F64, {static_cast<int64_t>(losses.size())}});
  for (const NamedTensor& of : tensors)
    entries.push_back({of.name, file_dtype(of.tensor), shape_of(of)});

  std::optional<RunFileWriter> writer;
  if (!path.empty()) {
    writer.emplace(path, run, entries);
    writer->add(kPosition, where.data(), bytes_of(where));
    if (!losses.empty()) writer->add(kValidation, losses.data(), bytes_of(losses));
  }
  // In pieces: the host may not have room for the weights of a whole model.
  constexpr int64_t kPieceBytes = int64_t{64} << 20;
  std::vector<uint8_t> host;
  for (const NamedTensor& of : tensors) {
    const int64_t piece = kPieceBytes / engine::size_bytes(of.tensor.dtype());
    const auto add = [&](const Tensor& flat) {
      if (!writer) return;
      for (int64_t begin = 0; begin < flat.numel(); begin += piece) {
        const Tensor part = flat.slice(begin, std::min(piece, flat.numel() - begin));
        host.resize(static_cast<size_t>(part.bytes()));
        backend.download(host.data(), part);
        writer->add(of.name, host.data(), bytes_of(host));
      }
    };
    if (of.set != nullptr)
      of.set->visit_whole(of.tensor, add);
    else
      add(of.tensor);
  }
  if (writer) writer->finish();
}

SavedState::SavedState(const std::string& path, uint64_t run)
    : path_(path), file_(open_run_file(path, run, "delete it to go on without it")) {
  const std::vector<int64_t> where =
      values_of<int64_t>(file_.at(kPosition), FileDType::I64, path_ + ": " + kPosition);
  BBB_CHECK(where.size() == 3, path_, ": ", kPosition, " is malformed");
  position_.block = where[0];
  position_.stage = where[1];
  position_.step = where[2];
  if (file_.contains(kValidation))
    position_.validation =
        values_of<double>(file_.at(kValidation), FileDType::F64, path_ + ": " + kValidation);
}

void SavedState::load(engine::Backend& backend, const NamedTensors& tensors) const {
  for (const NamedTensor& of : tensors) {
    const auto& [name, tensor, set] = of;
    const SafeTensor& saved = file_.at(name);
    BBB_CHECK(saved.shape == shape_of(of), path_, ": ", name, " is of another model");
    BBB_CHECK(saved.dtype == file_dtype(tensor), path_, ": ", name, " is a ", name_of(saved.dtype),
              ", but must be ", name_of(file_dtype(tensor)), "; delete it to go on without it");
    if (set != nullptr)
      set->upload_whole(tensor, saved.data);
    else
      backend.upload(tensor, saved.data);
  }
}

bool SaveTimer::due(int64_t step, Clock::time_point now) const {
  if (every_ > 0) return step % every_ == 0;
  return now - since_ >= std::max<Clock::duration>(kSaveAfter, kSaveShare * cost_);
}

void SaveTimer::saved(Clock::time_point begun, Clock::time_point now) {
  cost_ = now - begun;
  restart(now);
}

}  // namespace bbb::train
