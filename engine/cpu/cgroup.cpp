#include "engine/cpu/cgroup.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>

namespace bbb::engine {
namespace {

namespace fs = std::filesystem;

// The names of one version.
struct Version {
  const char *limit, *usage, *stat_prefix;
};
constexpr Version kOne{"memory.limit_in_bytes", "memory.usage_in_bytes", "total_"};
constexpr Version kTwo{"memory.max", "memory.current", ""};

std::optional<int64_t> number_in(const fs::path& file) {
  int64_t value = 0;
  std::ifstream in(file);
  return in >> value ? std::optional(value) : std::nullopt;  // "max" is no number
}

int64_t page_cache_bytes(const fs::path& group, const std::string& prefix) {
  std::ifstream in(group / "memory.stat");
  int64_t value = 0, bytes = 0;
  for (std::string key; in >> key >> value;)
    if (key == prefix + "inactive_file" || key == prefix + "active_file") bytes += value;
  return bytes;
}

// The limits of the group `path` and of its parents up to `root`. A container may list its path on
// the host and mount its own group as the root: then only the root exists.
void tighten(CgroupMemory& memory, const fs::path& root, fs::path path, const Version& version) {
  for (path = path.relative_path();; path = path.parent_path()) {
    const fs::path group = root / path;
    const std::optional<int64_t> limit = number_in(group / version.limit),
                                 usage = number_in(group / version.usage);
    if (limit && usage) {
      const int64_t used = *usage - page_cache_bytes(group, version.stat_prefix);
      memory.limit_bytes = std::min(memory.limit_bytes, *limit);
      memory.room_bytes =
          std::min(memory.room_bytes, std::max<int64_t>(0, *limit - std::max<int64_t>(0, used)));
    }
    if (path.empty()) return;
  }
}

}  // namespace

CgroupMemory cgroup_memory(const std::string& groups, const std::string& mount) {
  CgroupMemory memory;
  std::ifstream in(groups);
  for (std::string line; std::getline(in, line);) {  // NUMBER:CONTROLLERS:PATH
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == line.npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string path = line.substr(second + 1);
    if (controllers.find(",memory,") != controllers.npos)
      tighten(memory, fs::path(mount) / "memory", path, kOne);
    if (controllers == ",,")
      for (const char* root : {"", "unified"}) tighten(memory, fs::path(mount) / root, path, kTwo);
  }
  return memory;
}

}  // namespace bbb::engine
