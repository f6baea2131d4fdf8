#include "models/generator.h"

#include <algorithm>

#include "engine/transfers.h"

namespace bbb::models {

using autograd::TapeMode;
using engine::DType;
using engine::Lane;

Generator::Generator(Llama& model, int64_t batch, int64_t capacity_tokens,
                     const engine::SampleSpec& spec, quant::KvFormat kv)
    : model_(model),
      backend_(model.backend()),
      batch_(batch),
      capacity_(capacity_tokens),
      spec_(spec),
      kv_(backend_, model.config(), batch, capacity_tokens, kv),
      counters_(backend_.zeros({batch + 1}, DType::I32)),
      tokens_(backend_.zeros({batch}, DType::I32)),
      logged_(kLogRows),
      held_(static_cast<size_t>(batch)),
      last_(static_cast<size_t>(batch)) {
  kv_.start = counters_.rows(0, batch);
  rows_.seeds = backend_.zeros({batch, 2}, DType::I32);
  rows_.positions = kv_.start;
  if (spec.repetition_penalty != 1)
    rows_.seen = backend_.zeros({batch, (model.config().vocab + 7) / 8}, DType::U8);
  rows_.log = backend_.zeros({kLogRows, batch}, DType::I32);
  rows_.cursor = counters_.rows(batch, 1);
  kv_.decoder = model.layer_decoder(kv_);
  host_log_ = backend_.transfers().host_buffer(rows_.log.bytes());
  step_ = backend_.record([this] {
    Tape tape(backend_, TapeMode::Inference);
    const Var h = model_.forward(tape, tokens_.view({batch_, 1}), &kv_, Recompute::None);
    const Tensor logits = model_.logits(h.value().view({batch_, model_.config().d_model}));
    backend_.sample(tokens_, logits, rows_, spec_);
    backend_.advance(counters_);
  });
}

int32_t Generator::prefill(int64_t b, const std::vector<int32_t>& tokens, uint64_t seed) {
  const int64_t count = static_cast<int64_t>(tokens.size());
  BBB_ASSERT(count > 0 && count <= capacity_);
  const int64_t kept = this->kept(b, tokens), fresh = count - kept;
  held_[static_cast<size_t>(b)] = tokens;

  KvCache cache = kv_.sequence(b);
  set_position(cache.start, kept);
  const Tensor ids = upload_ints(backend_, {tokens.begin() + kept, tokens.end()}, {1, fresh});
  Tape tape(backend_, TapeMode::Inference);
  const Var h = model_.forward(tape, ids, &cache, Recompute::None);
  const Tensor last = h.value().view({fresh, model_.config().d_model}).rows(fresh - 1, 1);

  // As in a step, whose input is the last token.
  set_position(cache.start, count - 1);
  engine::SampleRows row{.seeds = rows_.seeds.rows(b, 1), .positions = cache.start};
  const int32_t halves[] = {static_cast<int32_t>(seed), static_cast<int32_t>(seed >> 32)};
  backend_.upload(row.seeds, halves);
  if (rows_.seen.defined()) {
    row.seen = rows_.seen.rows(b, 1);
    std::vector<uint8_t> bits(static_cast<size_t>(row.seen.numel()));
    for (const int32_t id : tokens)
      bits[static_cast<size_t>(id / 8)] |= static_cast<uint8_t>(1 << id % 8);
    backend_.upload(row.seen, bits.data());
  }
  const Tensor chosen = tokens_.rows(b, 1);
  backend_.sample(chosen, model_.logits(last), row, spec_);
  backend_.advance(cache.start);
  int32_t& token = last_[static_cast<size_t>(b)];
  backend_.download(&token, chosen);
  return token;
}

int64_t Generator::kept(int64_t b, const std::vector<int32_t>& tokens) const {
  const std::vector<int32_t>& held = held_[static_cast<size_t>(b)];
  // The last token runs in any case, for its logits.
  return std::mismatch(tokens.begin(), tokens.end() - 1, held.begin(), held.end()).first -
         tokens.begin();
}

void Generator::set_position(const Tensor& start, int64_t position) {
  const std::vector<int32_t> positions(static_cast<size_t>(start.numel()),
                                       static_cast<int32_t>(position));
  backend_.upload(start, positions.data());
}

void Generator::clear(int64_t b) {
  held_[static_cast<size_t>(b)].clear();
  set_position(kv_.start.rows(b, 1), 0);
}

void Generator::assume(int64_t count) {
  for (auto& held : held_) held.assign(static_cast<size_t>(count), -1);
  set_position(kv_.start, count);
}

int64_t Generator::steps_left() const {
  size_t most = 0;
  for (const auto& held : held_) most = std::max(most, held.size());
  return capacity_ - static_cast<int64_t>(most);
}

void Generator::start_step() {
  step_->run();
  engine::Transfers& transfers = backend_.transfers();
  const int64_t row = started_++ % kLogRows;
  transfers.follow(Lane::Store, *transfers.mark(Lane::Compute));
  transfers.store(static_cast<int32_t*>(host_log_->data()) + row * batch_, rows_.log.rows(row, 1));
  logged_[static_cast<size_t>(row)] = transfers.mark(Lane::Store);
}

void Generator::run(int64_t steps,
                    const std::function<bool(const std::vector<int32_t>& tokens)>& each) {
  BBB_ASSERT(steps <= steps_left());
  const int64_t ahead = backend_.device() == engine::DeviceType::Cpu ? 0 : kAhead;
  const int64_t first = started_, end = first + steps;
  bool more = true;
  for (int64_t step = first; step < (more ? end : started_); ++step) {
    while (more && started_ < std::min(end, step + ahead + 1)) start_step();
    const int64_t row = step % kLogRows;
    logged_[static_cast<size_t>(row)]->wait();
    for (size_t b = 0; b < held_.size(); ++b) held_[b].push_back(last_[b]);
    std::copy_n(static_cast<const int32_t*>(host_log_->data()) + row * batch_, batch_,
                last_.begin());
    if (std::ranges::any_of(last_, [](int32_t token) { return token < 0; }))
      backend_.synchronize();  // throws: no token could be chosen
    if (!each(last_)) more = false;
  }
}

}  // namespace bbb::models
