#include "engine/socket_comm.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <optional>
#include <utility>

namespace bbb::engine {
namespace {

using Clock = std::chrono::steady_clock;

constexpr char kMagic[8] = {'b', 'b', 'b', 'r', 'a', 'n', 'k', '2'};
constexpr int64_t kPieceBytes = int64_t{4} << 20;  // of a reduction or a message, at once
constexpr int64_t kHelloPatience_ms = 5000;
constexpr double kWorks = 0.01;  // the part of a core that a rank uses at least while it works
// Messages on control. Behind kBeat: a Standing. Behind kLeaving: the text's length, U32, and the
// text.
constexpr char kBeat = 'h', kLeaving = 'x', kDone = 'b';
constexpr int64_t kReduce = 1, kExchange = 2, kGather = 3;

enum Channel : int32_t { kData = 0, kControl = 1 };

// The first bytes of a connection.
struct Hello {
  char magic[sizeof kMagic];
  int32_t rank, size, channel;
};

double cpu_seconds(const rusage& used) {
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

Clock::duration seconds(double s) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
}

bool send_all(int fd, const void* bytes, int64_t count) {
  const char* at = static_cast<const char*>(bytes);
  while (count > 0) {
    const ssize_t sent = ::send(fd, at, static_cast<size_t>(count), MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    at += sent;
    count -= sent;
  }
  return true;
}

bool receive_all(int fd, void* bytes, int64_t count) {
  char* at = static_cast<char*>(bytes);
  while (count > 0) {
    const ssize_t got = ::recv(fd, at, static_cast<size_t>(count), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    at += got;
    count -= got;
  }
  return true;
}

void set_options(int fd, int64_t receive_ms) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  const timeval timeout{static_cast<time_t>(receive_ms / 1000),
                        static_cast<suseconds_t>(receive_ms % 1000 * 1000)};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
}

bool readable(int fd, int timeout_ms) {
  pollfd one{fd, POLLIN, 0};
  return poll(&one, 1, timeout_ms) > 0;
}

// One attempt; not open if nobody answers.
// A line about a wait that takes long, once.
class Notice {
 public:
  explicit Notice(const RankPatience& patience)
      : due_(Clock::now() + seconds(patience.notice_s)), most_s_(patience.connect_s) {}
  void waits_for(const std::string& what) {
    if (said_ || Clock::now() < due_) return;
    said_ = true;
    std::fprintf(stderr, "%s, up to %g s from the start\n", what.c_str(), most_s_);
  }

 private:
  Clock::time_point due_;
  double most_s_;
  bool said_ = false;
};

Socket connect_once(const std::string& address, int port) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  if (getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found) != 0)
    return Socket();
  Socket connected;
  for (const addrinfo* at = found; at != nullptr && !connected.is_open(); at = at->ai_next) {
    Socket socket(::socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC, at->ai_protocol));
    if (socket.is_open() && ::connect(socket.fd(), at->ai_addr, at->ai_addrlen) == 0)
      connected = std::move(socket);
  }
  freeaddrinfo(found);
  return connected;
}

}  // namespace

Socket::~Socket() {
  if (fd_ >= 0) close(fd_);
}

Listener::Listener(Reach reach, int port)
    : socket_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  const int on = 1;
  setsockopt(fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(reach == Reach::ThisHost ? INADDR_LOOPBACK : INADDR_ANY);
  auto* const any = reinterpret_cast<sockaddr*>(&address);
  socklen_t size = sizeof address;
  BBB_CHECK(socket_.is_open() && bind(fd(), any, size) == 0 && listen(fd(), SOMAXCONN) == 0 &&
                getsockname(fd(), any, &size) == 0,
            "rank 0 cannot wait for the others at port ", port, ": ", std::strerror(errno));
  port_ = ntohs(address.sin_port);
}

SocketComm::SocketComm(const Listener& listener, int size, RankKeeper keeper,
                       const RankPatience& patience)
    : Comm(0, size), patience_(patience), keeper_(std::move(keeper)) {
  for (int rank = 1; rank < size; ++rank) peers_.emplace_back().rank = rank;
  const auto deadline = Clock::now() + seconds(patience.connect_s);
  Notice notice(patience);
  const auto missing = [&] {
    return std::ranges::find_if(
        peers_, [](const Peer& p) { return !p.data.is_open() || !p.control.is_open(); });
  };
  while (missing() != peers_.end()) {
    const int absent = missing()->rank;
    for (const Peer& peer : peers_)
      if (const std::string fate = keeper_.fate ? keeper_.fate(peer.rank) : ""; !fate.empty())
        throw RankLost(cat("rank ", peer.rank, " ", fate), false);
    if (Clock::now() > deadline)
      throw RankLost(cat("rank ", absent, " has not connected within ", patience.connect_s, " s"),
                     false);
    notice.waits_for(cat("rank 0 waits at port ", listener.port(), " for rank ", absent));
    if (!readable(listener.fd(), 100)) continue;
    Socket socket(accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!socket.is_open()) continue;
    set_options(socket.fd(), kHelloPatience_ms);
    Hello hello{};
    if (!receive_all(socket.fd(), &hello, sizeof hello) ||
        std::memcmp(hello.magic, kMagic, sizeof kMagic) != 0)
      continue;  // not of this program
    BBB_CHECK(hello.size == size && hello.rank > 0 && hello.rank < size, "rank ", hello.rank,
              " of ", hello.size, " has come to rank 0 of ", size);
    Peer& peer = peers_[static_cast<size_t>(hello.rank - 1)];
    Socket& channel = hello.channel == kData ? peer.data : peer.control;
    BBB_CHECK(!channel.is_open(), "two processes are rank ", hello.rank);
    set_options(socket.fd(), 0);
    channel = std::move(socket);
  }
  begin();
}

SocketComm::SocketComm(const std::string& address, int port, int rank, int size,
                       const RankPatience& patience)
    : Comm(rank, size), patience_(patience) {
  BBB_ASSERT(rank > 0 && rank < size);
  Peer& hub = peers_.emplace_back();
  const auto deadline = Clock::now() + seconds(patience.connect_s);
  Notice notice(patience);
  for (const Channel channel : {kData, kControl}) {
    Socket& socket = channel == kData ? hub.data : hub.control;
    while (!(socket = connect_once(address, port)).is_open()) {
      if (Clock::now() > deadline)
        throw RankLost(cat("rank ", rank, " cannot reach rank 0 at ", address, ":", port), false);
      notice.waits_for(cat("rank ", rank, " waits for rank 0 at ", address, ":", port));
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    set_options(socket.fd(), 0);
    Hello hello{{}, rank, size, channel};
    std::memcpy(hello.magic, kMagic, sizeof kMagic);
    send_all(socket.fd(), &hello, sizeof hello);  // a failure shows at the first collective
  }
  begin();
}

void SocketComm::begin() {
  int ends[2];
  BBB_CHECK(pipe2(ends, O_CLOEXEC) == 0, "no pipe: ", std::strerror(errno));
  wake_read_ = Socket(ends[0]);
  wake_write_ = Socket(ends[1]);
  thread_ = std::thread([this] { watch(); });
  try {
    find_host_ranks();
  } catch (...) {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_write_ = Socket();
    thread_.join();
    throw;
  }
}

// Ranks with the same name of their host share it.
void SocketComm::find_host_ranks() {
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  const std::vector<std::string> hosts = exchange(name.data());
  host_ranks_ = static_cast<int>(std::ranges::count(hosts, name.data()));
  host_rank_ = static_cast<int>(std::count(hosts.begin(), hosts.begin() + rank(), name.data()));
}

// Says good-bye, and reads until the others do: closing a socket with unread bytes would drop what
// they have not read.
SocketComm::~SocketComm() {
  tell({kDone});
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_write_ = Socket();
  thread_.join();
  for (const Peer& peer : peers_) shutdown(peer.control.fd(), SHUT_WR);
  const auto deadline = Clock::now() + std::chrono::seconds(1);
  for (const Peer& peer : peers_) {
    std::array<char, 256> rest;
    while (!peer.gone && Clock::now() < deadline)
      if (readable(peer.control.fd(), 20) &&
          recv(peer.control.fd(), rest.data(), rest.size(), 0) <= 0)
        break;
  }
}

std::vector<int64_t> SocketComm::enter(int64_t kind, int64_t bytes) {
  ++collectives_;
  const int64_t own[2] = {kind, bytes};
  std::vector<int64_t> counts;
  for (const Peer& peer : peers_) {
    if (!first()) {
      send(peer, own, sizeof own);
      continue;
    }
    int64_t theirs[2];
    receive(peer, theirs, sizeof theirs);
    BBB_ASSERT(theirs[0] == kind);
    counts.push_back(theirs[1]);
  }
  return counts;
}

template <typename T>
void SocketComm::reduce(T* x, int64_t count, Reduce op) {
  const int64_t piece = kPieceBytes / static_cast<int64_t>(sizeof(T));
  std::vector<T> theirs(static_cast<size_t>(first() ? std::min(piece, count) : 0));
  for (int64_t begin = 0; begin < count; begin += piece) {
    const int64_t n = std::min(piece, count - begin), bytes = n * int64_t{sizeof(T)};
    T* const own = x + begin;
    if (!first()) {
      send(peers_[0], own, bytes);
      receive(peers_[0], own, bytes);
      continue;
    }
    for (const Peer& peer : peers_) {
      receive(peer, theirs.data(), bytes);
      for (int64_t i = 0; i < n; ++i) {
        const T value = theirs[static_cast<size_t>(i)];
        own[i] = op == Reduce::Max ? std::max(own[i], value) : own[i] + value;
      }
    }
    if (op == Reduce::Mean)
      for (int64_t i = 0; i < n; ++i) own[i] /= static_cast<T>(size());
    for (const Peer& peer : peers_) send(peer, own, bytes);
  }
}

void SocketComm::all_reduce(const Tensor& x, Reduce op) {
  BBB_ASSERT(x.device() == DeviceType::Cpu && (x.dtype() == DType::F32 || x.dtype() == DType::F64));
  for (const int64_t bytes : enter(kReduce, x.bytes())) BBB_ASSERT(bytes == x.bytes());
  if (x.dtype() == DType::F32)
    reduce(x.data<float>(), x.numel(), op);
  else
    reduce(x.data<double>(), x.numel(), op);
}

void SocketComm::start_all_gather(const Tensor& x) {
  BBB_ASSERT(x.device() == DeviceType::Cpu);
  for (const int64_t bytes : enter(kGather, x.bytes())) BBB_ASSERT(bytes == x.bytes());
  const int64_t part = part_of(x).bytes();
  char* const all = static_cast<char*>(x.raw());
  if (!first()) {
    send(peers_[0], all + rank() * part, part);
    return receive(peers_[0], all, x.bytes());
  }
  for (const Peer& peer : peers_) receive(peer, all + peer.rank * part, part);
  for (const Peer& peer : peers_) send(peer, all, x.bytes());
}

std::vector<std::string> SocketComm::exchange(const std::string& bytes) {
  const std::vector<int64_t> counts = enter(kExchange, static_cast<int64_t>(bytes.size()));
  std::vector<std::string> all{bytes};
  if (first()) {
    for (size_t i = 0; i < peers_.size(); ++i) {
      std::string& theirs = all.emplace_back(static_cast<size_t>(counts[i]), '\0');
      receive(peers_[i], theirs.data(), counts[i]);
    }
    for (const Peer& peer : peers_)
      for (const std::string& part : all) {
        const auto count = static_cast<int64_t>(part.size());
        send(peer, &count, sizeof count);
        send(peer, part.data(), count);
      }
    return all;
  }
  send(peers_[0], bytes.data(), static_cast<int64_t>(bytes.size()));
  all.resize(static_cast<size_t>(size()));
  for (std::string& part : all) {
    int64_t count = 0;
    receive(peers_[0], &count, sizeof count);
    part.resize(static_cast<size_t>(count));
    receive(peers_[0], part.data(), count);
  }
  return all;
}

void SocketComm::watch_device(std::function<DeviceSigns()> ask) {
  const std::lock_guard lock(mutex_);
  ask_device_ = std::move(ask);
}

void SocketComm::send(const Peer& peer, const void* bytes, int64_t count) {
  for (int64_t at = 0; at < count; at += kPieceBytes) {
    const int64_t piece = std::min(count - at, kPieceBytes);
    if (!send_all(peer.data.fd(), static_cast<const char*>(bytes) + at, piece))
      throw_lost(peer.rank);
    moved_bytes_ += piece;
  }
}

void SocketComm::receive(const Peer& peer, void* bytes, int64_t count) {
  for (int64_t at = 0; at < count; at += kPieceBytes) {
    const int64_t piece = std::min(count - at, kPieceBytes);
    if (!receive_all(peer.data.fd(), static_cast<char*>(bytes) + at, piece)) throw_lost(peer.rank);
    moved_bytes_ += piece;
  }
}

// The control thread learns the reason, perhaps a little later.
void SocketComm::throw_lost(int rank) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, std::chrono::seconds(5), [this] { return lost_; });
  if (lost_) throw RankLost(why_, said_);
  throw RankLost(cat("the connection to rank ", rank, " broke"), false);
}

bool SocketComm::leave(const std::string& why) noexcept {
  const auto length = static_cast<uint32_t>(why.size());
  std::string message(1, kLeaving);
  message.append(reinterpret_cast<const char*>(&length), sizeof length);
  tell(message + why);
  const std::lock_guard lock(mutex_);
  return !first() && (said_ || !peers_[0].gone);
}

void SocketComm::tell(const std::string& message) noexcept {
  const std::lock_guard lock(mutex_);
  for (const Peer& peer : peers_)
    if (!peer.gone)
      ::send(peer.control.fd(), message.data(), message.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
}

std::string SocketComm::fate_of(int rank) const {
  const auto deadline = Clock::now() + std::chrono::seconds(1);
  std::string fate;
  if (keeper_.fate)  // a connection closes a moment before its process can be waited for
    while ((fate = keeper_.fate(rank)).empty() && Clock::now() < deadline)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
  return cat("rank ", rank, " ", fate.empty() ? "has ended" : fate,
             "; the same command continues the run");
}

// Of the control thread alone.
void SocketComm::lose(const std::string& why, bool said) {
  if (lost_) return;
  if (first()) leave(why);  // before anything that the main thread says when it learns of this
  {
    const std::lock_guard lock(mutex_);
    lost_ = true;
    why_ = why;
    said_ = said;
  }
  for (const Peer& peer : peers_) shutdown(peer.data.fd(), SHUT_RDWR);  // ends what waits there
  changed_.notify_all();
}

void SocketComm::hear(Peer& peer) {
  std::array<char, 4096> bytes;
  const ssize_t got = recv(peer.control.fd(), bytes.data(), bytes.size(), MSG_DONTWAIT);
  if (got < 0 && (errno == EINTR || errno == EAGAIN)) return;
  if (got <= 0) {
    {
      const std::lock_guard lock(mutex_);
      peer.gone = true;
    }
    return lose(fate_of(peer.rank), false);
  }
  peer.silent = 0;
  peer.inbox.append(bytes.data(), static_cast<size_t>(got));
  while (!peer.inbox.empty()) {
    size_t used = 1;
    if (peer.inbox[0] == kBeat) {
      used += sizeof peer.standing;
      if (peer.inbox.size() < used) return;
      std::memcpy(&peer.standing, peer.inbox.data() + 1, sizeof peer.standing);
    } else if (peer.inbox[0] == kLeaving) {
      uint32_t length = 0;
      if (peer.inbox.size() < 1 + sizeof length) return;
      std::memcpy(&length, peer.inbox.data() + 1, sizeof length);
      used += sizeof length + length;
      if (peer.inbox.size() < used) return;
      lose(peer.inbox.substr(1 + sizeof length, length), !first());
    } else if (peer.inbox[0] == kDone) {
      const std::lock_guard lock(mutex_);
      peer.gone = true;
    }
    peer.inbox.erase(0, used);
  }
}

SocketComm::Standing SocketComm::own_standing() {
  rusage process{}, own_thread{};
  getrusage(RUSAGE_SELF, &process);
  getrusage(RUSAGE_THREAD, &own_thread);
  const double cpu_s = cpu_seconds(process) - cpu_seconds(own_thread);
  const int64_t disk = process.ru_majflt + process.ru_inblock + process.ru_oublock;
  DeviceSigns device = device_;  // what one that is no longer watched had come to
  device.waiting = false;
  {
    const std::lock_guard lock(mutex_);
    if (ask_device_) device = ask_device_();
  }
  const int64_t moved_bytes = moved_bytes_;
  const bool computes = !device.waiting && cpu_s - cpu_s_ > kWorks * patience_.beat_s;
  const bool works =
      computes || device != device_ || disk != disk_ || moved_bytes != last_moved_bytes_;
  last_moved_bytes_ = moved_bytes;
  cpu_s_ = cpu_s;
  disk_ = disk;
  device_ = device;
  return {works ? 0 : standing_.idle + 1, device.collectives, collectives_};
}

// Silence and idleness count in beats of their own processes, so that one that was stopped itself
// accuses nobody.
void SocketComm::beat() {
  standing_ = own_standing();
  std::string message(1, kBeat);
  message.append(reinterpret_cast<const char*>(&standing_), sizeof standing_);
  tell(message);
  for (Peer& peer : peers_)
    if (!peer.gone && ++peer.silent > patience_.beats)
      lose(cat("rank ", peer.rank, " does not answer for ", patience_.beat_s * patience_.beats,
               " s; the same command continues the run"),
           false);
  if (first()) find_stuck();
}

// A GPU comes to its collectives behind its host, so its count decides first.
void SocketComm::find_stuck() {
  const auto order = [](const Standing& s) {
    return std::pair(s.device_collectives, s.collectives);
  };
  int stuck = 0;
  auto least = order(standing_), most = least;
  int64_t idle = standing_.idle;
  for (const Peer& peer : peers_) {
    idle = std::min(idle, peer.gone ? 0 : peer.standing.idle);
    const auto theirs = order(peer.standing);
    if (theirs < least) stuck = peer.rank;
    least = std::min(least, theirs);
    most = std::max(most, theirs);
  }
  if (idle < patience_.beats) return;
  const std::string fate = least == most ? "no rank has made" : cat("rank ", stuck, " has made no");
  lose(cat(fate, " progress for ", patience_.beat_s * patience_.beats,
           " s; the same command continues the run"),
       false);
}

void SocketComm::watch() {
  auto next_beat = Clock::now() + seconds(patience_.beat_s);
  std::optional<Clock::time_point> leave_at;
  for (;;) {
    std::vector<pollfd> waited{{wake_read_.fd(), POLLIN, 0}};
    for (const Peer& peer : peers_)
      waited.push_back({peer.gone ? -1 : peer.control.fd(), POLLIN, 0});
    const auto wait = std::chrono::duration_cast<std::chrono::milliseconds>(
        std::min(next_beat, leave_at.value_or(next_beat)) - Clock::now());
    poll(waited.data(), waited.size(), static_cast<int>(std::max<int64_t>(0, wait.count() + 1)));
    for (size_t i = 0; i < peers_.size(); ++i)
      if (waited[i + 1].revents != 0) hear(peers_[i]);
    if (Clock::now() >= next_beat) {
      beat();
      next_beat = Clock::now() + seconds(patience_.beat_s);
    }
    const std::lock_guard lock(mutex_);
    if (stopping_) return;
    if (lost_ && !leave_at) leave_at = Clock::now() + seconds(patience_.leave_s);
    if (leave_at && Clock::now() >= *leave_at) {
      if (!said_) std::fprintf(stderr, "bbb: %s\n", why_.c_str());
      if (keeper_.end_all) keeper_.end_all();
      _exit(1);
    }
  }
}

}  // namespace bbb::engine
