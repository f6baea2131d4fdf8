// SocketComm: ranks on CPUs, of one host or several, over TCP. It also carries what ranks on GPUs
// tell each other outside of their steps.
//
// Rank 0 is the hub: it has two connections to every other rank.
//
//   data      collectives: rank 0 receives from rank 1, 2, .., adds in this order, sends the result
//   control   a thread of its own on either side: a beat every 3 s, and the reason why a rank ends
//
// A rank is lost if its control connection closes, or is silent for 30 s: its process has ended,
// is stopped, or cannot be reached.
//
// A rank is idle while it uses no core for 1 % of the time, reads and writes no disk, moves no
// bytes of a collective, begins no wait for its GPU, and its GPU comes to no further collective or
// pass. A host that waits for its GPU uses a core, which does not count. Waiting for other ranks is
// idle, computing is not, however long it takes. If all ranks are idle for 30 s, then the one is
// lost that has come to the fewest collectives: all others wait for it. It hangs, for instance in a
// file system or on its GPU.
//
// Once a rank is lost, every collective throws RankLost. Where a thread does not come to a
// collective within 10 s, for instance because a GPU waits for the lost rank, the process prints
// the reason and ends.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/comm.h"

namespace bbb::engine {

// A rank that others wait for is gone; the text names it. said: rank 0 has printed it.
class RankLost : public Error {
 public:
  RankLost(const std::string& text, bool said) : Error(text), said(said) {}
  const bool said;
};

// Owns a file descriptor.
class Socket {
 public:
  explicit Socket(int fd = -1) : fd_(fd) {}
  ~Socket();
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  int fd() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }

 private:
  int fd_;
};

// Where rank 0 waits for the others.
class Listener {
 public:
  enum class Reach { ThisHost, AnyHost };
  // port 0: a free one. Throws if the port is taken.
  Listener(Reach reach, int port);
  int port() const { return port_; }
  int fd() const { return socket_.fd(); }

 private:
  Socket socket_;
  int port_ = 0;
};

// What the process knows that has started the other ranks of its host. Either may be empty.
struct RankKeeper {
  std::function<std::string(int rank)> fate;  // "was killed by signal 9 (Killed)"; "" if it runs
  std::function<void()> end_all;              // ends the other processes
};

struct RankPatience {
  double connect_s = 50;  // for all ranks to connect
  double notice_s = 5;    // then a rank that still waits for others says so, once
  double beat_s = 3;
  int beats = 10;       // silent, or with all ranks idle: then a rank is lost
  double leave_s = 10;  // then the process ends, though its main thread has not noticed
};

class SocketComm final : public Comm {
 public:
  // Rank 0 of `size`. Returns when all have connected. Throws, naming a rank that has not.
  SocketComm(const Listener& listener, int size, RankKeeper keeper = {},
             const RankPatience& patience = {});
  // Another rank: connects to rank 0.
  SocketComm(const std::string& address, int port, int rank, int size,
             const RankPatience& patience = {});
  ~SocketComm() override;

  // x: F32 or F64 on the CPU.
  void all_reduce(const Tensor& x, Reduce op) override;
  void start_reduce_scatter(const Tensor& x, Reduce op) override { all_reduce(x, op); }
  void start_all_gather(const Tensor& x) override;
  std::vector<std::string> exchange(const std::string& bytes) override;
  void watch_device(std::function<DeviceSigns()> ask) override;

  // How many lower ranks are on this host: the index of this rank's GPU there.
  int host_rank() const { return host_rank_; }
  // Tells the other ranks why this one ends. Returns whether rank 0 prints a reason: this one, or
  // one that it has already.
  bool leave(const std::string& why) noexcept;

 private:
  // What a beat says of its rank.
  struct Standing {
    int64_t idle = 0;  // beats without a sign of work
    int64_t device_collectives = 0, collectives = 0;
  };
  struct Peer {
    int rank = 0;
    Socket data, control;
    Standing standing;
    int silent = 0;  // beats without a byte
    bool gone = false;
    std::string inbox;  // bytes of control that are no whole message yet
  };

  void begin();  // once the peers are connected
  void find_host_ranks();
  // Of a collective: checks that all ranks are in the same one. Returns each peer's bytes.
  std::vector<int64_t> enter(int64_t kind, int64_t bytes);
  template <typename T>
  void reduce(T* x, int64_t count, Reduce op);
  void send(const Peer& peer, const void* bytes, int64_t count);
  void receive(const Peer& peer, void* bytes, int64_t count);
  [[noreturn]] void throw_lost(int rank);

  void watch();  // the control thread
  void beat();
  Standing own_standing();
  void find_stuck();
  void hear(Peer& peer);
  void lose(const std::string& why, bool said);
  void tell(const std::string& message) noexcept;  // to every peer that is there
  std::string fate_of(int rank) const;

  const RankPatience patience_;
  const RankKeeper keeper_;
  std::vector<Peer> peers_;  // of rank 0: ranks 1, 2, ..; of the others: rank 0
  int host_rank_ = 0;
  std::atomic<int64_t> collectives_{0};  // entered
  std::atomic<int64_t> moved_bytes_{0};  // of collectives

  // Of the control thread: its last look at this process.
  Standing standing_;
  DeviceSigns device_;
  double cpu_s_ = 0;
  int64_t disk_ = 0, last_moved_bytes_ = 0;

  std::mutex mutex_;  // of what follows, and of writing to control
  std::condition_variable changed_;
  bool stopping_ = false, lost_ = false, said_ = false;
  std::string why_;
  std::function<DeviceSigns()> ask_device_;
  Socket wake_read_, wake_write_;  // a pipe that wakes the thread
  std::thread thread_;
};

}  // namespace bbb::engine
