// Comm over sockets: sums, exchanged bytes, lost ranks; and what launchers say.
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <map>

#include "engine/rng.h"
#include "tests/on_ranks.h"
#include "tests/printed.h"
#include "tests/support.h"
#include "tools/ranks.h"

namespace bbb::tests {
namespace {

using Catch::Matchers::Contains;
using engine::Comm;
using engine::Reduce;
using Ranks = std::shared_ptr<Comm>;

// Values of one rank that differ in size, so that another order of adding shows.
std::vector<double> values_of_rank(int rank, int64_t count) {
  engine::Rng rng(static_cast<uint64_t>(rank) + 1);
  std::vector<double> values = normal(rng, count);
  for (double& value : values) value *= rank == 1 ? 1e4 : 1;
  return values;
}

template <typename T>
std::vector<T> added_in_order(int size, int64_t count, Reduce op) {
  std::vector<T> sums(static_cast<size_t>(count));
  for (int rank = 0; rank < size; ++rank) {
    const std::vector<double> values = values_of_rank(rank, count);
    for (size_t i = 0; i < sums.size(); ++i)
      sums[i] = rank == 0 ? static_cast<T>(values[i]) : sums[i] + static_cast<T>(values[i]);
  }
  if (op == Reduce::Mean)
    for (T& sum : sums) sum /= static_cast<T>(size);
  return sums;
}

template <typename T>
void check_reduction(DType dtype) {
  Backend& device = dtype == DType::F64 ? oracle_f64() : oracle();
  constexpr int64_t kCount = (int64_t{9} << 20) / sizeof(T) + 5;  // two pieces and a rest
  for (const int size : {1, 2, 3})
    for (const Reduce op : {Reduce::Sum, Reduce::Mean}) {
      CAPTURE(size, op == Reduce::Mean);
      std::vector<Tensor> tensors;
      for (int rank = 0; rank < size; ++rank)
        tensors.push_back(make(device, {kCount}, dtype, values_of_rank(rank, kCount)));
      const auto errors = on_ranks(size, [&](const Ranks& comm) {
        // The slowest rank is another one each time.
        std::this_thread::sleep_for(std::chrono::milliseconds(comm->rank() == size % 3 ? 20 : 0));
        comm->all_reduce(tensors[static_cast<size_t>(comm->rank())], op);
      });
      CHECK(errors == no_errors(size));
      const std::vector<T> expected = added_in_order<T>(size, kCount, op);
      for (const Tensor& tensor : tensors)
        CHECK(std::equal(expected.begin(), expected.end(), tensor.data<T>()));
    }
}

}  // namespace

TEST_CASE("a reduction adds in the order of ranks, and every rank gets the same bytes", "[comm]") {
  check_reduction<float>(DType::F32);
  check_reduction<double>(DType::F64);
}

TEST_CASE("ranks exchange bytes of any length, and sum host values", "[comm]") {
  std::vector<std::vector<std::string>> seen(3);
  std::vector<std::vector<double>> sums(3);
  std::vector<int> on_host(3);
  const auto errors = on_ranks(3, [&](const Ranks& comm) {
    const auto rank = static_cast<size_t>(comm->rank());
    seen[rank] = comm->exchange(std::string(rank * 100'000, static_cast<char>('a' + rank)));
    sums[rank] = comm->sum({1.0 + comm->rank(), 0.5});
    on_host[rank] = comm->host_ranks();
  });
  CHECK(errors == no_errors(3));
  for (size_t rank = 0; rank < 3; ++rank) {
    CHECK(seen[rank] ==
          std::vector<std::string>{"", std::string(100'000, 'b'), std::string(200'000, 'c')});
    CHECK(sums[rank] == std::vector<double>{6, 1.5});
    CHECK(on_host[rank] == 3);
  }
}

TEST_CASE("values of shared elements come back in order", "[comm]") {
  for (const int64_t count : {0, 2, 7}) {
    std::vector<std::vector<double>> seen(3);
    const auto errors = on_ranks(3, [&](const Ranks& comm) {
      std::vector<double> own;
      for (int64_t i = comm->rank(); i < count; i += 3) own.push_back(0.5 * static_cast<double>(i));
      seen[static_cast<size_t>(comm->rank())] = tools::from_all_ranks(*comm, own, count);
    });
    CHECK(errors == no_errors(3));
    std::vector<double> expected;
    for (int64_t i = 0; i < count; ++i) expected.push_back(0.5 * static_cast<double>(i));
    for (const auto& values : seen) CHECK(values == expected);
  }
}

TEST_CASE("one process is a Comm that changes nothing", "[comm]") {
  Comm comm;
  const Tensor x = make(oracle(), {2}, DType::F32, {1, 2});
  comm.all_reduce(x, Reduce::Mean);
  CHECK(values_of(oracle(), x) == std::vector<double>{1, 2});
  CHECK(comm.sum({3}) == std::vector<double>{3});
  CHECK(comm.share(7) == 7);
  CHECK(Comm(2, 3).share(7) == 2);
  CHECK(Comm(2, 3).share(0) == 0);
}

TEST_CASE("the reason why a rank ends reaches all others", "[comm]") {
  for (const int failing : {0, 1, 2}) {
    CAPTURE(failing);
    const auto errors = on_ranks(3, [&](const Ranks& comm) {
      if (comm->rank() == failing) throw Error("the disk is full");
      for (;;) comm->barrier();
    });
    for (int rank = 0; rank < 3; ++rank)
      CHECK(errors[static_cast<size_t>(rank)] ==
            (rank == failing ? "the disk is full" : cat("rank ", failing, ": the disk is full")));
  }
}

namespace {

constexpr engine::RankPatience kShort = {.beat_s = 0.1};

// Rank 0 of two processes and rank 1 meet once; then the child, one of them, calls `act`, and the
// other one waits for it. Returns why that one ends, "" if they meet again.
std::string seen_by_the_other(int child_rank, const std::function<void()>& act) {
  const engine::Listener listener(engine::Listener::Reach::ThisHost, 0);
  const auto connect = [&](int rank) {
    return rank == 0
               ? std::make_unique<engine::SocketComm>(listener, 2, engine::RankKeeper(), kShort)
               : std::make_unique<engine::SocketComm>("127.0.0.1", listener.port(), 1, 2, kShort);
  };
  std::fflush(nullptr);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const auto comm = connect(child_rank);
    comm->barrier();
    act();
    comm->barrier();
    _exit(0);
  }
  std::string why;
  const auto start = std::chrono::steady_clock::now();
  try {
    const auto comm = connect(1 - child_rank);
    comm->barrier();
    comm->barrier();
  } catch (const engine::RankLost& lost) {
    why = lost.what();
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  CHECK(took.count() < 20);
  kill(child, SIGKILL);
  REQUIRE(waitpid(child, nullptr, 0) == child);
  return why;
}

}  // namespace

TEST_CASE("a process that ends or hangs is named", "[comm]") {
  for (const int rank : {0, 1}) {
    const std::string name = cat("rank ", rank);
    CHECK_THAT(seen_by_the_other(rank, [] { raise(SIGKILL); }), Contains(name + " has ended"));
    CHECK_THAT(seen_by_the_other(rank, [] { raise(SIGSTOP); }),
               Contains(name + " does not answer for 1 s"));
    // Its control thread lives.
    CHECK_THAT(seen_by_the_other(rank, [] { pause(); }),
               Contains(name + " has made no progress for 1 s"));
  }
}

TEST_CASE("a process that computes is not taken for one that hangs", "[comm]") {
  const auto compute = [] {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(3);
    while (std::chrono::steady_clock::now() < end) {
    }
  };
  CHECK(seen_by_the_other(1, compute) == "");
}

TEST_CASE("a rank that does not come is named", "[comm]") {
  const engine::Listener listener(engine::Listener::Reach::ThisHost, 0);
  CHECK_THROWS_WITH(engine::SocketComm(listener, 2, {}, {.connect_s = 0.2}),
                    Contains("rank 1 has not connected"));
  CHECK_THROWS_WITH(
      engine::SocketComm(listener, 2, {.fate = [](int) { return "has ended"; }, .end_all = {}}, {}),
      Contains("rank 1 has ended"));
  const int nobody = engine::Listener(engine::Listener::Reach::ThisHost, 0).port();
  CHECK_THROWS_WITH(engine::SocketComm("127.0.0.1", nobody, 1, 2, {.connect_s = 0.2}),
                    Contains("rank 1 cannot reach rank 0 at 127.0.0.1"));
}

TEST_CASE("ranks that wait for long say for whom, once", "[comm]") {
  const engine::RankPatience patience{.connect_s = 0.6, .notice_s = 0.2};
  const engine::Listener listener(engine::Listener::Reach::ThisHost, 0);
  const auto said = [](const auto& wait) {
    return printed_by([&] { CHECK_THROWS_AS(wait(), engine::RankLost); }).err;
  };
  CHECK(said([&] { engine::SocketComm(listener, 2, {}, patience); }) ==
        cat("rank 0 waits at port ", listener.port(), " for rank 1, up to 0.6 s from the start\n"));
  const int nobody = engine::Listener(engine::Listener::Reach::ThisHost, 0).port();
  CHECK(said([&] { engine::SocketComm("127.0.0.1", nobody, 1, 2, patience); }) ==
        cat("rank 1 waits for rank 0 at 127.0.0.1:", nobody, ", up to 0.6 s from the start\n"));
}

TEST_CASE("the place of a process is read from what its launcher sets", "[comm]") {
  using Variables = std::map<std::string, const char*>;
  const auto place = [](const Variables& set) {
    return tools::rank_place(
        [&](const char* name) { return set.count(name) ? set.at(name) : nullptr; });
  };
  CHECK_FALSE(place({}));
  CHECK_FALSE(place({{"RANK", "1"}}));
  const auto torchrun = place({{"RANK", "5"},
                               {"WORLD_SIZE", "8"},
                               {"LOCAL_RANK", "1"},
                               {"MASTER_ADDR", "node0"},
                               {"MASTER_PORT", "1234"},
                               {"SLURM_PROCID", "0"},
                               {"SLURM_NTASKS", "2"}});
  REQUIRE(torchrun);
  CHECK(torchrun->rank == 5);
  CHECK(torchrun->size == 8);
  CHECK(torchrun->local_rank == 1);
  CHECK(torchrun->address == "node0");
  CHECK(torchrun->port == 1234);
  CHECK(place({{"RANK", "0"},
               {"WORLD_SIZE", "2"},
               {"MASTER_PORT", "1234"},
               {"TORCHELASTIC_USE_AGENT_STORE", "True"}})
            ->port == 1235);
  const auto slurm = place({{"SLURM_PROCID", "1"}, {"SLURM_NTASKS", "2"}, {"SLURM_LOCALID", "0"}});
  REQUIRE(slurm);
  CHECK(slurm->rank == 1);
  CHECK(slurm->local_rank == 0);
  CHECK(slurm->address == "127.0.0.1");
  const auto mpi = place({{"OMPI_COMM_WORLD_RANK", "2"}, {"OMPI_COMM_WORLD_SIZE", "3"}});
  REQUIRE(mpi);
  CHECK(mpi->rank == 2);
  CHECK_FALSE(mpi->local_rank);
  CHECK_THROWS_AS(place({{"RANK", "2"}, {"WORLD_SIZE", "2"}}), UsageError);
  CHECK_THROWS_AS(place({{"RANK", "one"}, {"WORLD_SIZE", "2"}}), UsageError);
  CHECK_THROWS_AS(place({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_PORT", "0"}}), UsageError);
}

}  // namespace bbb::tests
