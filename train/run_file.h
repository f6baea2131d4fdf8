// The tensor files of a run: finished stages, states, the final file. Besides its tensors each file
// holds
//   run       I64 (1)  checksum of the run's record, by which files of another run are refused
//   checksum  I64 (1)  of every byte of the file before it
#pragma once

#include <map>
#include <string>
#include <vector>

#include "data/safetensors.h"

namespace bbb::train {

// Add the tensors of `entries` in their order, then finish(), which renames the file into place.
class RunFileWriter : public data::SafeTensorsWriter {
 public:
  RunFileWriter(const std::string& path, uint64_t run, std::vector<Entry> entries,
                std::map<std::string, std::string> metadata = {});
};

// Reads the whole file once. Throws, naming it and ending in `remedy`, if a byte has changed or the
// file is of another run.
data::SafeTensors open_run_file(const std::string& path, uint64_t run, const std::string& remedy);

}  // namespace bbb::train
