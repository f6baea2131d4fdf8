// {"made_by": library and device, "algorithms": {product: algorithm, ..}, "checksum": of both}
#include "train/gemm_choices.h"

#include <filesystem>
#include <utility>

#include "data/checksum.h"
#include "data/files.h"
#include "train/run_directory.h"

namespace bbb::train {

using engine::GemmChoices;

namespace {

// Only the library can read an algorithm's bytes, and wrong bytes may crash it. Hence a checksum.
std::string checksum(const GemmChoices& choices) {
  std::string text = choices.made_by;
  for (const auto& [product, algorithm] : choices.algorithms)
    text += cat("\n", product, "\n", algorithm);
  return data::hex(data::checksum64(text));
}

}  // namespace

void save_gemm_choices(const std::string& path, const GemmChoices& choices) {
  Json json;
  json["made_by"] = choices.made_by;
  json["algorithms"] = choices.algorithms;
  json["checksum"] = checksum(choices);
  data::write_file_atomic(path, json.dump(1) + "\n");
}

GemmChoices load_gemm_choices(const std::string& path) {
  const nlohmann::json json = nlohmann::json::parse(data::read_file(path), nullptr, false);
  GemmChoices choices;
  bool whole = false;
  try {
    json.at("made_by").get_to(choices.made_by);
    json.at("algorithms").get_to(choices.algorithms);
    whole = json.at("checksum").get<std::string>() == checksum(choices);
  } catch (const nlohmann::json::exception&) {  // not whole
  }
  BBB_CHECK(whole, path,
            ": damaged: its checksum does not fit; delete it to time the products again");
  return choices;
}

engine::GemmTuning stored_gemm_tuning(const engine::Backend& backend, const std::string& path,
                                      int64_t memory_bytes,
                                      std::function<void(const std::string&)> say) {
  engine::GemmTuning tuning;
  if (std::filesystem::exists(path)) {
    tuning.known = load_gemm_choices(path);
    if (tuning.known.made_by != backend.gemm_library()) {
      if (say)
        say(cat(path, ": GEMM algorithms chosen by ", tuning.known.made_by, ", here is ",
                backend.gemm_library(), ": timed anew; the last bits of the result may differ"));
      tuning.known = GemmChoices();
    }
  }
  tuning.where = path;
  tuning.memory_bytes = memory_bytes;
  if (!path.empty())
    tuning.keep = [path](const GemmChoices& choices) { save_gemm_choices(path, choices); };
  tuning.say = std::move(say);
  return tuning;
}

}  // namespace bbb::train
