#include "tools/ranks.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "cuda/nccl_comm.h"
#include "engine/cpu/thread_pool.h"

extern char** environ;

namespace bbb::tools {
namespace {

// Variables of one launcher.
struct Names {
  const char *rank, *size, *local_rank;
};
constexpr Names kLaunchers[] = {
    {"RANK", "WORLD_SIZE", "LOCAL_RANK"},
    {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"},
    {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"}};

int number_of(const char* name, const char* text, int least, int most) {
  int number = 0;
  const char* const end = text + std::strlen(text);
  const auto [stopped, error] = std::from_chars(text, end, number);
  if (error != std::errc() || stopped != end || number < least || number > most)
    throw UsageError(
        cat(name, " is '", text, "', but must be a number from ", least, " to ", most));
  return number;
}

const char* text_of(const std::exception& error) {
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) return "out of memory on the host";
  return error.what();
}

}  // namespace

std::optional<RankPlace> rank_place(const std::function<const char*(const char* name)>& value) {
  for (const Names& names : kLaunchers) {
    const char *const rank = value(names.rank), *const size = value(names.size),
                      *const local = value(names.local_rank);
    if (rank == nullptr || size == nullptr) continue;
    RankPlace place;
    place.size = number_of(names.size, size, 1, 1 << 16);
    place.rank = number_of(names.rank, rank, 0, place.size - 1);
    if (local != nullptr) place.local_rank = number_of(names.local_rank, local, 0, place.rank);
    if (const char* address = value("MASTER_ADDR")) place.address = address;
    if (const char* port = value("MASTER_PORT"))
      place.port = number_of("MASTER_PORT", port, 1, 65534);
    // There torchrun itself listens.
    const char* const agent = value("TORCHELASTIC_USE_AGENT_STORE");
    if (agent != nullptr && agent == std::string("True")) ++place.port;
    return place;
  }
  return std::nullopt;
}

RankProcesses::RankProcesses(int size, int port, const std::string& command,
                             const Arguments& arguments) {
  std::vector<std::string> words{"bbb", command};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  for (int rank = 1; rank < size; ++rank) {
    const std::vector<std::pair<std::string, std::string>> set = {
        {"RANK", cat(rank)},        {"WORLD_SIZE", cat(size)},
        {"LOCAL_RANK", cat(rank)},  {"MASTER_ADDR", "127.0.0.1"},
        {"MASTER_PORT", cat(port)}, {"TORCHELASTIC_USE_AGENT_STORE", "False"}};
    std::vector<std::string> variables;
    for (char** at = environ; *at != nullptr; ++at) {
      const std::string variable = *at;
      const auto replaced = [&](const auto& pair) {
        return variable.starts_with(pair.first + "=");
      };
      if (std::ranges::none_of(set, replaced)) variables.push_back(variable);
    }
    for (const auto& [name, text] : set) variables.push_back(cat(name, "=", text));
    std::vector<char*> envp;
    for (std::string& variable : variables) envp.push_back(variable.data());
    envp.push_back(nullptr);
    Process process;
    const int error =
        posix_spawn(&process.id, "/proc/self/exe", nullptr, nullptr, argv.data(), envp.data());
    if (error != 0) {
      kill_all();
      throw Error(cat("rank ", rank, " cannot be started: ", std::strerror(error)));
    }
    processes_.push_back(process);
  }
}

RankProcesses::~RankProcesses() {
  await_all();
  kill_all();
}

std::string RankProcesses::fate(int rank) {
  Process& process = processes_.at(static_cast<size_t>(rank - 1));
  int status = 0;
  if (!process.ended && waitpid(process.id, &status, WNOHANG) == process.id) {
    process.ended = true;
    process.fate = WIFSIGNALED(status) ? cat("was killed by signal ", WTERMSIG(status), " (",
                                             strsignal(WTERMSIG(status)), ")")
                                       : cat("has ended with exit code ", WEXITSTATUS(status));
  }
  return process.fate;
}

void RankProcesses::await_all() {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  for (size_t i = 0; i < processes_.size(); ++i)
    while (fate(static_cast<int>(i) + 1).empty() && std::chrono::steady_clock::now() < deadline)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
}

void RankProcesses::kill_all() {
  for (const Process& process : processes_)
    if (!process.ended) kill(process.id, SIGKILL);
  await_all();  // one that hangs in a file system does not end
}

void add_rank_options(CommandLine& line) {
  line.options()  //
      ("gpus", "share the work among so many GPUs of this host, one process each",
       cxxopts::value<std::string>())  //
      ("ranks", "the same, as processes on whatever device it is", cxxopts::value<std::string>());
}

int ranks_asked(const CommandLine& line) {
  if (line.has("ranks") && line.has("gpus")) throw UsageError("give one of --ranks and --gpus");
  if (line.has("gpus") && line.text("device") == "cpu")
    throw UsageError("--gpus takes GPUs: with --device cpu give --ranks");
  const char* const option = line.has("gpus") ? "gpus" : "ranks";
  return line.has(option) ? static_cast<int>(line.integer(option, 1, 1 << 16)) : 0;
}

std::string rank_device(const CommandLine& line) {
  return line.has("gpus") ? "cuda" : line.text("device");
}

std::unique_ptr<engine::Backend> make_rank_backend(const std::string& device, int threads,
                                                   const engine::Comm& comm, int local_rank) {
  if (comm.host_ranks() > 1) {
    if (threads == 0) threads = static_cast<int>(std::thread::hardware_concurrency());
    threads = std::max(1, threads / comm.host_ranks());
    engine::set_default_threads(threads);
  }
  return CommandLine::make_backend(device, threads,
                                   comm.size() > 1 ? cuda::gpu_of_rank(local_rank) : 0);
}

std::vector<double> from_all_ranks(engine::Comm& comm, const std::vector<double>& own,
                                   int64_t count) {
  BBB_ASSERT(static_cast<int64_t>(own.size()) == comm.share(count));
  const std::vector<std::string> parts =
      comm.exchange({reinterpret_cast<const char*>(own.data()), own.size() * sizeof(double)});
  std::vector<double> all(static_cast<size_t>(count));
  for (size_t i = 0; i < all.size(); ++i)
    std::memcpy(&all[i], parts[i % parts.size()].data() + i / parts.size() * sizeof(double),
                sizeof(double));
  return all;
}

int run_as_rank(int ranks, const std::string& command, const Arguments& arguments,
                const RankBody& body, const engine::RankPatience& patience) {
  const auto said = rank_place([](const char* name) { return std::getenv(name); });
  const bool launched = said.has_value() && said->size > 1 && ranks != 1;
  RankPlace place;
  place.size = std::max(1, ranks);
  if (launched) place = said.value_or(place);
  const int rank = place.rank;
  if (ranks > 1 && place.size != ranks)
    throw UsageError(cat("--ranks or --gpus is ", ranks, ", but the launcher has started ",
                         place.size, " processes"));
  if (place.size == 1) {
    body(std::make_shared<engine::Comm>(), 0);
    return 0;
  }
  std::optional<engine::Listener> listener;
  std::optional<RankProcesses> others;  // outlives comm, whose end they wait for
  std::shared_ptr<engine::SocketComm> comm;
  try {
    if (rank > 0) {
      BBB_CHECK(std::freopen("/dev/null", "w", stdout) != nullptr,
                "no /dev/null: ", std::strerror(errno));
      comm = std::make_shared<engine::SocketComm>(place.address, place.port, rank, place.size,
                                                  patience);
    } else {
      using Reach = engine::Listener::Reach;
      listener.emplace(launched ? Reach::AnyHost : Reach::ThisHost, launched ? place.port : 0);
      engine::RankKeeper keeper;
      if (!launched) {
        others.emplace(place.size, listener->port(), command, arguments);
        keeper = {[&](int of) { return others->fate(of); }, [&] { others->kill_all(); }};
      }
      comm =
          std::make_shared<engine::SocketComm>(*listener, place.size, std::move(keeper), patience);
    }
    body(comm, place.local_rank.value_or(comm->host_rank()));
    comm->barrier();  // until rank 0 has written everything
    return 0;
  } catch (const engine::RankLost& lost) {
    // One line: of rank 0 or, where that is lost, of rank 1.
    if (lost.said || rank > 1) return 1;
    throw;
  } catch (const std::exception& error) {
    if (rank == 0) {
      if (comm) comm->leave(cat("rank 0: ", text_of(error)));
      throw;
    }
    const std::string named = cat("rank ", rank, ": ", text_of(error));
    if (comm && comm->leave(named)) return 1;
    throw Error(named);
  }
}

}  // namespace bbb::tools
