// The memory limit of a control group, from trees as the kernel shows them.
#include "engine/cpu/cgroup.h"

#include <catch2/catch.hpp>
#include <filesystem>

#include "engine/cpu/memory.h"
#include "tests/model_files.h"
#include "tests/support.h"

namespace bbb::tests {

namespace {

struct Tree {
  TempDir dir;

  void write(const std::string& group, const std::string& file, const std::string& content) const {
    std::filesystem::create_directories(dir / "mount/" + group);
    write_plain(dir / "mount/" + group + "/" + file, content);
  }
  engine::CgroupMemory of(const std::string& groups) const {
    write_plain(dir / "groups", groups);
    return engine::cgroup_memory(dir / "groups", dir / "mount");
  }
};

}  // namespace

TEST_CASE("cgroup: version 2 takes the tightest of a group and its parents", "[cgroup]") {
  const Tree tree;
  tree.write("user", "memory.max", "1000\n");
  tree.write("user", "memory.current", "900\n");
  tree.write("user", "memory.stat", "anon 100\ninactive_file 300\nactive_file 200\n");
  tree.write("user/job", "memory.max", "max\n");
  tree.write("user/job", "memory.current", "800\n");
  const engine::CgroupMemory memory = tree.of("1:name=systemd:/x\n0::/user/job\n");
  CHECK(memory.limit_bytes == 1000);
  CHECK(memory.room_bytes == 600);  // the page cache can go

  tree.write("user/job", "memory.max", "850\n");
  CHECK(tree.of("0::/user/job\n").limit_bytes == 850);
  CHECK(tree.of("0::/user/job\n").room_bytes == 50);
  CHECK(tree.of("0::/other\n").limit_bytes == INT64_MAX);
}

TEST_CASE("cgroup: version 1, and a container that sees its own group as the root", "[cgroup]") {
  const Tree tree;
  tree.write("memory", "memory.limit_in_bytes", "5000\n");
  tree.write("memory", "memory.usage_in_bytes", "6000\n");
  tree.write("memory", "memory.stat", "inactive_file 1\ntotal_inactive_file 500\n");
  const engine::CgroupMemory memory = tree.of("9:cpu:/\n4:hugetlb,memory:/docker/0123abc\n");
  CHECK(memory.limit_bytes == 5000);
  CHECK(memory.room_bytes == 0);  // more is used than allowed: no room, not less than none
}

TEST_CASE("cgroup: no group, no limit", "[cgroup]") {
  const engine::CgroupMemory memory = engine::cgroup_memory("/nowhere", "/nowhere");
  CHECK(memory.limit_bytes == INT64_MAX);
  CHECK(memory.room_bytes == INT64_MAX);
  CHECK(engine::HostMemory::available_bytes() <= engine::HostMemory::total_bytes());
}

}  // namespace bbb::tests
