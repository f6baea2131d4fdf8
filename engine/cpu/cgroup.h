// The memory limit of the control group that the process runs in: containers and batch systems set
// one. The kernel kills a process that exceeds it.
#pragma once

#include <cstdint>
#include <string>

namespace bbb::engine {

struct CgroupMemory {
  int64_t limit_bytes = INT64_MAX;  // INT64_MAX: there is none
  int64_t room_bytes = INT64_MAX;   // what the group may still take, page cache not counted
};

// The tightest of the process's groups and their parents, of version 1 and 2. `groups`: the file
// that lists the groups; `mount`: where their trees are.
CgroupMemory cgroup_memory(const std::string& groups = "/proc/self/cgroup",
                           const std::string& mount = "/sys/fs/cgroup");

}  // namespace bbb::engine
