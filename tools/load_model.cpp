#include "tools/load_model.h"

#include "engine/progress.h"

namespace bbb::tools {

std::unique_ptr<models::Llama> load_model(engine::Backend& backend,
                                          const models::Checkpoint& source) {
  source.check_finite();
  auto model = std::make_unique<models::Llama>(backend, source, models::HeadRounding::None);
  engine::Progress progress("loading", source.config().layers, engine::Progress::kPatience_s);
  model->load_blocks(source, [&](int64_t done) { progress.set(done); });
  return model;
}

}  // namespace bbb::tools
