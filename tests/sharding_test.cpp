// Parameters sharded over ranks: their layout, their steps against one rank's, and the collectives
// that they need.
#include <catch2/catch.hpp>

#include "autograd/optimizer.h"
#include "engine/rng.h"
#include "tests/on_ranks.h"
#include "tests/support.h"
#include "train/step_loop.h"

namespace bbb::tests {
namespace {

using engine::Comm;
using engine::Reduce;
using Ranks = std::shared_ptr<Comm>;

// Normal values of every parameter of a set that is not sharded, times `scale`; padding is 0.
std::vector<float> random_values(autograd::ParameterSet& set, uint64_t seed, double scale) {
  engine::Rng rng(seed);
  std::vector<float> values(static_cast<size_t>(set.masters().numel()));
  for (const auto& parameter : set.parameters()) {
    const auto begin = static_cast<size_t>(set.offset(*parameter));
    for (int64_t i = 0; i < parameter->master.numel(); ++i)
      values[begin + static_cast<size_t>(i)] = static_cast<float>(scale * rng.normal());
  }
  return values;
}

// Two weights, of which no number of ranks divides the second, between norms.
struct Parameters {
  Parameters(Backend& backend, Comm* comm) : set(backend, autograd::GradientPasses::Several, comm) {
    for (const auto& [name, shape] : {std::pair{"first", Shape{40, 64}},
                                      {"norm", Shape{64}},
                                      {"second", Shape{7, 96}},
                                      {"last norm", Shape{96}}}) {
      set.add(name, shape).sharded = comm != nullptr && shape.size() == 2;
    }
    set.allocate();
  }
  autograd::Parameter& named(const std::string& name) {
    for (const auto& parameter : set.parameters())
      if (parameter->name == name) return *parameter;
    throw Error(name);
  }

  autograd::ParameterSet set;
};

std::vector<double> whole_of(Backend& backend, const autograd::ParameterSet& set,
                             const Tensor& flat) {
  std::vector<double> whole;
  set.visit_whole(flat, [&](const Tensor& piece) {
    const std::vector<double> values = values_of(backend, piece);
    whole.insert(whole.end(), values.begin(), values.end());
  });
  return whole;
}

}  // namespace

TEST_CASE("a part is reduced for its rank, and parts are gathered by all", "[comm]") {
  for (const int size : {2, 3}) {
    const auto errors = on_ranks(size, [&](const Ranks& comm) {
      const int64_t part = 5, count = part * size;
      std::vector<double> own;
      for (int64_t i = 0; i < count; ++i) own.push_back(static_cast<double>(i + comm->rank()));
      const Tensor x = make(oracle(), {count}, DType::F32, own);
      comm->start_reduce_scatter(x, Reduce::Mean);
      comm->join();
      std::vector<double> mean;
      for (int64_t i = 0; i < part; ++i)
        mean.push_back(static_cast<double>(part * comm->rank() + i) + 0.5 * (size - 1));
      BBB_CHECK(values_of(oracle(), comm->part_of(x)) == mean, "a part is wrong");
      oracle().zero(x);
      oracle().copy(comm->part_of(x), make(oracle(), {part}, DType::F32, mean));
      comm->start_all_gather(x);
      comm->join();
      for (int64_t i = 0; i < count; ++i)
        own[static_cast<size_t>(i)] = static_cast<double>(i) + 0.5 * (size - 1);
      BBB_CHECK(values_of(oracle(), x) == own, "gathered parts are wrong");
      const Tensor most =
          make(oracle(), {2}, DType::F32, {1.0 * comm->rank(), -1.0 * comm->rank()});
      comm->all_reduce(most, Reduce::Max);
      BBB_CHECK(values_of(oracle(), most) == (std::vector<double>{size - 1.0, 0}),
                "a maximum is wrong");
    });
    CHECK(errors == no_errors(size));
  }
}

TEST_CASE("a whole buffer is the same for any number of ranks", "[sharding]") {
  Parameters alone(oracle(), nullptr);
  const std::vector<float> values = random_values(alone.set, 3, 1);
  alone.set.upload_whole(alone.set.masters(), values.data());
  const std::vector<double> expected = whole_of(oracle(), alone.set, alone.set.masters());
  CHECK(expected == std::vector<double>(values.begin(), values.end()));
  for (const int size : {2, 3, 7}) {
    CAPTURE(size);
    const auto errors = on_ranks(size, [&](const Ranks& comm) {
      const auto device = engine::make_cpu_backend(1);
      Parameters shared(*device, comm.get());
      BBB_CHECK(shared.set.whole_entries(shared.set.masters()) == std::ssize(expected), "size");
      shared.set.upload_whole(shared.set.masters(), values.data());
      BBB_CHECK(whole_of(*device, shared.set, shared.set.masters()) == expected, "whole");
      // A part holds this rank's elements of the parameter, then zeros.
      const autograd::Parameter& second = shared.named("second");
      const auto [begin, end] = shared.set.own_range(second);
      const std::vector<double> part =
          values_of(*device, shared.set.own_part(shared.set.masters(), second));
      const auto first = static_cast<size_t>(alone.set.offset(alone.named("second")));
      for (size_t i = 0; i < part.size(); ++i) {
        const bool held = static_cast<int64_t>(i) < end - begin;
        const double wanted = held ? expected[first + static_cast<size_t>(begin) + i] : 0;
        BBB_CHECK(part[i] == wanted, "element ", i);
      }
    });
    CHECK(errors == no_errors(size));
  }
}

// The clip acts in the first step alone, so that a norm of one rank's part would change the
// moments.
TEST_CASE("sharded steps are those of one rank", "[sharding]") {
  Parameters alone(oracle(), nullptr);
  const std::vector<float> masters = random_values(alone.set, 5, 1);
  const std::vector<std::vector<float>> gradients{random_values(alone.set, 6, 3.0),
                                                  random_values(alone.set, 7, 1e-3)};
  struct Result {
    std::vector<double> masters, norms;
  };
  const auto train = [&](Backend& device, autograd::ParameterSet& set) {
    Result result;
    autograd::Optimizer optimizer(set, nullptr, {}, train::schedule_of(0.1, 4));
    const Tensor loss = device.zeros({1}, device.real());
    set.upload_whole(set.masters(), masters.data());
    for (const std::vector<float>& gradient : gradients) {
      set.upload_whole(set.grads(), gradient.data());
      optimizer.step(loss);
      result.norms.push_back(values_of(device, optimizer.control())[engine::kGradNorm]);
    }
    result.masters = whole_of(device, set, set.masters());
    return result;
  };
  const Result expected = train(oracle(), alone.set);
  CHECK(expected.norms[0] > 100);
  CHECK(expected.norms[1] < 1);
  for (const int size : {2, 3}) {
    CAPTURE(size);
    const auto errors = on_ranks(size, [&](const Ranks& comm) {
      const auto device = engine::make_cpu_backend(1);
      Parameters shared(*device, comm.get());
      const Result result = train(*device, shared.set);
      BBB_CHECK(relative_error(result.norms, expected.norms) < 1e-6, "norms");
      BBB_CHECK(relative_error(result.masters, expected.masters) < 1e-6, "masters");
    });
    CHECK(errors == no_errors(size));
  }
}

}  // namespace bbb::tests
