// The tensor files of a run: finished stages, states, the final file. Beside its tensors each holds
//   run       I64 (1)  checksum of the run's record: another run's file is not taken for this one's
//   checksum  I64 (1)  of every byte of the file before it
#pragma once

#include <map>
#include <string>
#include <vector>

#include "data/safetensors.h"

namespace bbb::train {

class RunFileWriter : public data::SafeTensorsWriter {
 public:
  RunFileWriter(const std::string& path, uint64_t run, std::vector<Entry> entries,
                std::map<std::string, std::string> metadata = {});
};

// Reads the whole file once. Throws, naming it and ending in `remedy`, where a byte is not what was
// written or the file is another run's.
data::SafeTensors open_run_file(const std::string& path, uint64_t run, const std::string& remedy);

}  // namespace bbb::train
