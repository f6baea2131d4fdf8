#include "tools/load_model.h"

#include <fmt/format.h>

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

std::string table_sizes(const models::Checkpoint& source) {
  const auto bytes = static_cast<double>(source.table_bytes());
  return fmt::format("{}: {:.1f} MB, {:.4f} bits per weight",
                     source.config().tied_head ? "embedding, also the head" : "embedding and head",
                     bytes / 1e6, 8 * bytes / static_cast<double>(source.table_weights()));
}

}  // namespace bbb::tools
