#include "train/memory_plan.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <numeric>

#include "data/files.h"
#include "engine/counting_backend.h"
#include "engine/cpu/memory.h"
#include "models/ldlq.h"
#include "models/synthetic_checkpoint.h"
#include "train/block_phase.h"
#include "train/end_to_end.h"
#include "train/gptq_phase.h"
#include "train/sensitivity.h"
#include "train/statistics.h"
#include "train/stream_set.h"

namespace bbb::train {

using engine::Backend;
using engine::CountingBackend;
using models::LlamaConfig;
using models::Recompute;

// Workspaces of a GPU's libraries, one for each of the two streams of a step.
static constexpr int64_t kLibraryBytes = int64_t{64} << 20;

namespace {

// count(mode) for the budget's mode; otherwise for the first mode that fits, or for Block.
template <typename Count>
PhaseMemory choose_recompute(const MemoryBudget& budget, int64_t room_bytes, const Count& count) {
  if (budget.recompute) return count(*budget.recompute);
  for (const Recompute mode : {Recompute::None, Recompute::Attention})
    if (const PhaseMemory memory = count(mode); memory.device_bytes <= room_bytes) return memory;
  return count(Recompute::Block);
}

PhaseMemory count_block_memory(const Backend& backend, const LlamaConfig& model,
                               const TrainConfig& config, Recompute recompute, StreamPlan streams) {
  // Streams in files take as much device memory as streams on the host. Counting creates no files.
  for (Tier& tier : streams.tiers)
    if (tier == Tier::File) tier = Tier::Host;
  CountingBackend counter(backend);
  const auto source = models::make_weightless_checkpoint(model);
  PhaseMemory memory;
  memory.recompute = recompute;
  static_cast<Rehearsal&>(memory) =
      config.method == Method::Gptq ? rehearse_gptq(counter, *source, config, streams)
                                    : rehearse_blocks(counter, *source, config, recompute, streams);
  memory.device_bytes = counter.memory_peak_bytes();
  return memory;
}

// Host memory of the largest factor of GPTQ's Hessians.
int64_t hessian_bytes(const LlamaConfig& model, const TrainConfig& config) {
  int64_t most = 0;
  if (config.method == Method::Gptq && block_stages(config) > 0)
    for (const quant::LinearFormat& format :
         Recipe(config, model).stage_formats(Recipe::widest_layer(config, model), 0))
      most = std::max(most, models::hessian_factor_bytes(format.stored_k()));
  return most;
}

// Host memory of LC's start: the moments of all sites, and the largest factor of one.
int64_t lc_start_bytes(const LlamaConfig& model) {
  int64_t most = 0;
  std::array<int64_t, models::kSites> moments{};
  for (const models::LinearShape& shape : models::block_linears(model)) {
    most = std::max(most, models::lc_factor_bytes(shape.k));
    moments[static_cast<size_t>(shape.site)] = 4 * shape.k * shape.k;
  }
  return std::accumulate(moments.begin(), moments.end(), most);
}

// The room for streams, except on the device.
StreamRoom room_off_device(const Backend& backend, const LlamaConfig& model,
                           const TrainConfig& config) {
  StreamRoom room;
  // The host also holds F32 weights: of this block, of the next one, and of each stage.
  const int64_t weights_bytes =
      (2 + static_cast<int64_t>(config.stages.size())) * block_parameters(model) * 4;
  room.host_bytes =
      std::max<int64_t>(0, engine::HostMemory::available_bytes() / config.memory.sharers / 5 * 4 -
                               weights_bytes - hessian_bytes(model, config));
  if (backend.device() == engine::DeviceType::Cpu)  // one memory for both
    room.host_bytes = std::max<int64_t>(0, room.host_bytes - tensor_room(backend, config.memory));
  if (config.memory.host_bytes > 0)
    room.host_bytes = std::min(room.host_bytes, config.memory.host_bytes);
  room.scratch = config.memory.scratch;
  if (!room.scratch.empty()) {
    BBB_CHECK(std::filesystem::is_directory(room.scratch), "--scratch ", room.scratch,
              ": is no directory to write to");
    room.scratch_bytes = data::free_disk_bytes(room.scratch) / config.memory.sharers;
  }
  return room;
}

}  // namespace

BlockMemory plan_block_memory(Backend& backend, const LlamaConfig& model,
                              const TrainConfig& config) {
  const StreamShape shape = StreamSet::shape(backend, model, config);
  const int64_t count = StreamSet::count(config);
  const int rings = StreamSet::rings(config);
  const int64_t device_bytes = tensor_room(backend, config.memory);
  // The least memory is that with all streams off the device. `least` leaves out the rings, because
  // plan_streams() counts them.
  StreamPlan elsewhere;
  elsewhere.tiers.assign(static_cast<size_t>(count), Tier::Host);
  elsewhere.rings = rings;
  const PhaseMemory chosen = choose_recompute(config.memory, device_bytes, [&](Recompute mode) {
    return count_block_memory(backend, model, config, mode, elsewhere);
  });
  const int64_t least = chosen.device_bytes - Ring::device_bytes(rings, shape);
  check_memory(backend, least, config.memory,
               cat("block training, its streams aside, with ", own_batch(config), " windows of ",
                   config.seq_len, " tokens at once"),
               "lower --batch or --seq-len");
  StreamRoom room = room_off_device(backend, model, config);
  room.device_bytes = device_bytes - least;
  for (;;) {
    BlockMemory memory;
    memory.streams = plan_streams(count, rings, shape, room);
    static_cast<PhaseMemory&>(memory) =
        count_block_memory(backend, model, config, chosen.recompute, memory.streams);
    if (memory.device_bytes <= device_bytes || !memory.streams.uses(Tier::Device)) return memory;
    // If a stream is on the device, a step gathers its batch into a tensor of its own. So the plan
    // may exceed the room: plan again with one stream less.
    room.device_bytes = memory.streams.device_bytes - 1;
  }
}

PhaseMemory count_end_to_end_memory(const Backend& backend, const LlamaConfig& model,
                                    const TrainConfig& config, Recompute recompute,
                                    TeacherStates teacher) {
  CountingBackend counter(backend);
  const auto source = models::make_weightless_checkpoint(model);
  PhaseMemory memory;
  memory.recompute = recompute;
  memory.teacher = teacher;
  static_cast<Rehearsal&>(memory) =
      rehearse_end_to_end(counter, *source, config, recompute, teacher);
  memory.device_bytes = counter.memory_peak_bytes();
  return memory;
}

PhaseMemory plan_end_to_end_memory(Backend& backend, const LlamaConfig& model,
                                   const TrainConfig& config) {
  const int64_t room = tensor_room(backend, config.memory);
  const PhaseMemory memory = choose_recompute(config.memory, room, [&](Recompute mode) {
    const auto count = [&](TeacherStates teacher) {
      return count_end_to_end_memory(backend, model, config, mode, teacher);
    };
    if (config.memory.teacher) return count(*config.memory.teacher);
    const PhaseMemory cached = count(TeacherStates::Cached);
    return cached.device_bytes <= room ? cached : count(TeacherStates::Beside);
  });
  std::string advice = "lower --seq-len or --e2e-micro-batch";
  if (config.e2e_embedding == EmbeddingTrain::Train) advice += ", take --e2e-embedding keep";
  if (config.e2e_moments == Moments::Wide && config.optimizer == autograd::UpdateRule::AdamW &&
      config.e2e_freeze == Freeze::None)
    advice += ", take --e2e-moments 8bit";
  if (config.e2e_train == EndToEndTrain::All && config.quantizer != Quantizer::Lc)
    advice += ", take --e2e-train scales";
  if (config.memory.recompute && *config.memory.recompute != Recompute::Block)
    advice += ", take --recompute block";
  if (config.memory.teacher) advice += ", leave out --teacher";
  if (block_stages(config) > 0) advice += ", or leave the phase out with --e2e-steps 0";
  check_memory(backend, memory.device_bytes, config.memory,
               cat("end-to-end training of ", own_micro_batch(config), " windows of ",
                   config.seq_len, " tokens at once"),
               advice);
  return memory;
}

int64_t count_statistics_memory(const Backend& backend, const LlamaConfig& model,
                                const TrainConfig& config) {
  CountingBackend counter(backend);
  const auto source = models::make_weightless_checkpoint(model);
  const TrainConfig alone = without_comm(config);
  rehearse_statistics(counter, *source, alone);
  if (allocates(config)) rehearse_sensitivity(counter, *source, alone);
  return counter.memory_peak_bytes();
}

void check_factor_memory(const LlamaConfig& model, const TrainConfig& config) {
  const int64_t bytes = std::max(hessian_bytes(model, config),
                                 Recipe::needs_starts(config) ? lc_start_bytes(model) : 0);
  const int64_t room = engine::HostMemory::available_bytes() / config.memory.sharers;
  BBB_CHECK(bytes <= room, "the factor of the inputs' second moments needs about ",
            (bytes >> 20) + 1, " MiB of host memory, but ", room >> 20, " MiB are left");
}

// A GPU's pool leaves gaps between blocks, and its libraries have workspaces.
int64_t allocated_bytes(const Backend& backend, int64_t bytes) {
  if (backend.device() == engine::DeviceType::Cpu) return bytes;
  return bytes + (bytes + 31) / 32 + kLibraryBytes;
}

static int64_t device_room(const Backend& backend, const MemoryBudget& budget) {
  int64_t available = backend.memory_available_bytes();
  if (backend.device() == engine::DeviceType::Cpu) available /= budget.sharers;
  return budget.device_bytes > 0 ? std::min(available, budget.device_bytes) : available;
}

int64_t tensor_room(const Backend& backend, const MemoryBudget& budget) {
  const int64_t room = device_room(backend, budget);
  if (backend.device() == engine::DeviceType::Cpu) return room;
  return std::max<int64_t>(0, room - kLibraryBytes) / 33 * 32;
}

void check_memory(const Backend& backend, int64_t bytes, const MemoryBudget& budget,
                  const std::string& what, const std::string& advice) {
  const int64_t room = device_room(backend, budget), needed = allocated_bytes(backend, bytes);
  const bool budgeted = room == budget.device_bytes;
  BBB_CHECK(bytes <= tensor_room(backend, budget), what, " needs about ", (needed >> 20) + 1,
            " MiB, but ", backend.device_name(), budgeted ? " is to give " : " has ", room >> 20,
            " MiB", budgeted ? ": raise --gpu-memory, or " : " left: ", advice);
}

}  // namespace bbb::train
