// The processes of a job: where this one stands among them, and starting the others.
//
//   bbb COMMAND --ranks N        starts N - 1 processes of itself on this host; this one is rank 0
//   LAUNCHER bbb COMMAND [..]    the launcher has started them, here and perhaps on other hosts
//
// Commands: train, ppl, eval, bench train.
//
// What a launcher says, the first that is set:
//   RANK, WORLD_SIZE, LOCAL_RANK                                torchrun, and the processes above
//   SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID                   srun
//   OMPI_COMM_WORLD_RANK, .._SIZE, .._LOCAL_RANK                mpirun
// Rank 0 waits for the others at MASTER_PORT (29500) of MASTER_ADDR (127.0.0.1).
#pragma once

#include <sys/types.h>

#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/socket_comm.h"
#include "tools/cli.h"

namespace bbb::tools {

struct RankPlace {
  int rank = 0, size = 1;
  std::optional<int> local_rank;  // on its host
  std::string address = "127.0.0.1";
  int port = 29500;
};
// Empty if no launcher has started this process. Throws UsageError on values that are no numbers or
// do not fit together. `value(name)`: of a variable; null if it is not set.
std::optional<RankPlace> rank_place(const std::function<const char*(const char* name)>& value);

// Ranks 1, 2, .. of this host: this program again, with the same arguments.
class RankProcesses {
 public:
  RankProcesses(int size, int port, const std::string& command, const Arguments& arguments);
  ~RankProcesses();  // waits for them a little, then kills them
  RankProcesses(const RankProcesses&) = delete;
  RankProcesses& operator=(const RankProcesses&) = delete;

  std::string fate(int rank);  // how it ended; "" while it runs
  void kill_all();             // and waits for them, at most 5 s

 private:
  void await_all();
  struct Process {
    pid_t id = 0;
    bool ended = false;
    std::string fate;
  };
  std::vector<Process> processes_;  // rank 1 first
};

// --gpus and --ranks, and the number of processes that they ask for; 0 if neither is given.
void add_rank_options(CommandLine& line);
int ranks_asked(const CommandLine& line);
// What --device says, or cuda with --gpus.
std::string rank_device(const CommandLine& line);

// Runs `body` as one rank of the job. `ranks`: the value of --ranks or --gpus, 0 if neither was
// given; it must fit what a launcher says, but 1 means this process alone. body's Comm carries host
// values (engine/socket_comm.h), `local_rank` is the index of its GPU.
//
// Other ranks than 0 have no standard output. If one fails, rank 0 prints its error.
using RankBody = std::function<void(const std::shared_ptr<engine::Comm>& comm, int local_rank)>;
int run_as_rank(int ranks, const std::string& command, const Arguments& arguments,
                const RankBody& body, const engine::RankPatience& patience = {});

// A rank's backend: on its own GPU, or with its part of the host's cores. `threads` as --threads.
std::unique_ptr<engine::Backend> make_rank_backend(const std::string& device, int threads,
                                                   const engine::Comm& comm, int local_rank);

// Those of rank 0, on every rank.
template <typename T>
std::vector<T> from_first_rank(engine::Comm& comm, const std::vector<T>& values) {
  const auto* const bytes = reinterpret_cast<const char*>(values.data());
  std::vector<std::string> of_ranks =
      comm.exchange(comm.first() ? std::string(bytes, values.size() * sizeof(T)) : "");
  const std::string first = std::move(of_ranks[0]);
  std::vector<T> all(first.size() / sizeof(T));
  if (!all.empty()) std::memcpy(all.data(), first.data(), first.size());
  return all;
}

// Of `count` values in all, each rank has its own (Comm), in order. Returns all, in order.
std::vector<double> from_all_ranks(engine::Comm& comm, const std::vector<double>& own,
                                   int64_t count);

}  // namespace bbb::tools
