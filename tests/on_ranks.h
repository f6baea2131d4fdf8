// Ranks as threads of one process: each with its SocketComm, all connected at a port of this host.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "engine/socket_comm.h"

namespace bbb::tests {

// Calls body(comm) for each of `size` ranks, and returns what each threw, "" if nothing.
inline std::vector<std::string> on_ranks(
    int size, const std::function<void(const std::shared_ptr<engine::Comm>& comm)>& body,
    const engine::RankPatience& patience = {}) {
  const engine::Listener listener(engine::Listener::Reach::ThisHost, 0);
  std::vector<std::string> errors(static_cast<size_t>(size));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      std::shared_ptr<engine::SocketComm> comm;
      try {
        if (size == 1) return body(std::make_shared<engine::Comm>());
        if (rank == 0)
          comm =
              std::make_shared<engine::SocketComm>(listener, size, engine::RankKeeper(), patience);
        else
          comm = std::make_shared<engine::SocketComm>("127.0.0.1", listener.port(), rank, size,
                                                      patience);
        body(comm);
        comm->barrier();
      } catch (const std::exception& error) {
        errors[static_cast<size_t>(rank)] = error.what();
        if (comm) comm->leave(cat("rank ", rank, ": ", error.what()));
      }
    });
  for (std::thread& thread : threads) thread.join();
  return errors;
}

// What on_ranks() returns if none threw.
inline std::vector<std::string> no_errors(int size) {
  return std::vector<std::string>(static_cast<size_t>(size));
}

}  // namespace bbb::tests
