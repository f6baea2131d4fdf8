// Comm: the processes, called ranks, that train one run together. Each takes its share of every
// batch; means and sums over the ranks then make all of them hold the same parameters.
//
//   element i of a list, for instance a window, belongs to rank i mod size
//
// Every rank calls the same functions in the same order. Sums have a fixed order: the results are
// the same bytes on every rank, and in every repetition. This class itself moves nothing. With one
// rank that is all there is to do. With more it is for rehearsals and dry runs, which count
// (engine/counting_backend.h) or time what one of them does.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "engine/tensor.h"

namespace bbb::engine {

enum class Reduce { Sum, Mean, Max };

// What shows that a GPU works on what its host has submitted.
struct DeviceSigns {
  int64_t collectives = 0;  // that it has come to
  int64_t passes = 0;       // that it has come to: show_work()
  int64_t waits = 0;        // begun by the host
  bool waiting = false;     // the host, for the GPU
  bool operator==(const DeviceSigns&) const = default;
};

class Comm {
 public:
  explicit Comm(int rank = 0, int size = 1, int host_ranks = 1)
      : rank_(rank), size_(size), host_ranks_(host_ranks) {}
  virtual ~Comm() = default;
  Comm(const Comm&) = delete;
  Comm& operator=(const Comm&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  bool first() const { return rank_ == 0; }       // prints, and writes files
  int host_ranks() const { return host_ranks_; }  // that share this host and its memory

  // How many of `count` elements belong to this rank.
  int64_t share(int64_t count) const { return (count - rank_ + size_ - 1) / size_; }

  // This rank's part of x, which has as many equal parts as there are ranks, in their order.
  Tensor part_of(const Tensor& x) const {
    BBB_ASSERT(x.numel() % size_ == 0);
    return x.slice(rank_ * (x.numel() / size_), x.numel() / size_);
  }

  // x = its sum, mean or maximum over the ranks, in stream order; a step may record it. x is on
  // this Comm's device: F32, F64 or, on a GPU, BF16, all ranks alike. Throws if a rank is lost.
  virtual void all_reduce(const Tensor& /*x*/, Reduce) {}
  // The same, perhaps beside the work that follows on the stream. Until join() nothing may use x.
  virtual void start_all_reduce(const Tensor& x, Reduce op) { all_reduce(x, op); }
  // The same for this rank's part of x alone. Afterwards the other parts are undefined.
  virtual void start_reduce_scatter(const Tensor& /*x*/, Reduce) {}
  // Every part of x = that of its own rank. Likewise beside other work; any dtype.
  virtual void start_all_gather(const Tensor& /*x*/) {}
  virtual void join() {}
  // The bytes of every rank, in the order of ranks. Throws if a rank is lost.
  virtual std::vector<std::string> exchange(const std::string& bytes) {
    return std::vector<std::string>(static_cast<size_t>(size_), bytes);
  }

  // Lets a watch over lost ranks ask for the signs of this rank's GPU, on a thread of its own.
  // Empty: no longer.
  virtual void watch_device(std::function<DeviceSigns()> /*ask*/) {}
  // A sign, in the order of what is submitted, that this rank's GPU works. For passes without a
  // collective.
  virtual void show_work() {}

  void barrier() { exchange(""); }  // returns when every rank has called it
  // The values of every rank, in the order of ranks. Each has as many.
  std::vector<std::vector<double>> gather(const std::vector<double>& values);
  // Their sums, added in the order of ranks.
  std::vector<double> sum(const std::vector<double>& values);

 protected:
  const int rank_, size_;
  int host_ranks_;
};

inline std::vector<std::vector<double>> Comm::gather(const std::vector<double>& values) {
  const size_t bytes = values.size() * sizeof(double);
  std::vector<std::vector<double>> all;
  for (const std::string& part : exchange({reinterpret_cast<const char*>(values.data()), bytes})) {
    BBB_ASSERT(part.size() == bytes);
    std::memcpy(all.emplace_back(values.size()).data(), part.data(), bytes);
  }
  return all;
}

inline std::vector<double> Comm::sum(const std::vector<double>& values) {
  std::vector<double> sums(values.size());
  for (const std::vector<double>& part : gather(values))
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += part[i];
  return sums;
}

}  // namespace bbb::engine
