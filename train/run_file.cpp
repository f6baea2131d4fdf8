#include "train/run_file.h"

#include <filesystem>

#include "data/half.h"
#include "quant/check.h"

namespace bbb::train {

using data::FileDType;
using Entries = std::vector<data::SafeTensorsWriter::Entry>;

static constexpr const char* kRun = "run";

static Entries with_run(Entries entries) {
  entries.insert(entries.begin(), {kRun, FileDType::I64, {1}});
  return entries;
}

RunFileWriter::RunFileWriter(const std::string& path, uint64_t run, Entries entries,
                             std::map<std::string, std::string> metadata)
    : SafeTensorsWriter(path, with_run(std::move(entries)), std::move(metadata),
                        data::Trailer::Checksum) {
  add(kRun, &run, sizeof run);
}

data::SafeTensors open_run_file(const std::string& path, uint64_t run, const std::string& remedy) {
  BBB_CHECK(std::filesystem::file_size(path) > 0 && data::trailer_matches(data::MappedFile(path)),
            path, ": damaged: its checksum does not fit; ", remedy);
  data::SafeTensors file(path);
  BBB_CHECK(file.contains(kRun) && data::load_as<uint64_t>(file.at(kRun).data) == run, path,
            ": is of another run; ", remedy);
  return file;
}

}  // namespace bbb::train
