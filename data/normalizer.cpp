#include "data/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "data/pre_tokenizer.h"
#include "quant/check.h"

namespace bbb::data {

using nlohmann::json;

namespace {

// The text in the Unicode normal form that utf8proc's `options` select.
std::string unicode_form(std::string_view text, int options) {
  std::string out;
  for (const auto& [run, is_valid] : utf8_runs(text)) {
    const bool is_ascii =
        std::all_of(run.begin(), run.end(), [](char c) { return (c & 0x80) == 0; });
    if (!is_valid || is_ascii) {  // ASCII is the same in every form
      out += run;
      continue;
    }
    uint8_t* mapped = nullptr;
    const utf8proc_ssize_t bytes = utf8proc_map(reinterpret_cast<const uint8_t*>(run.data()),
                                                static_cast<utf8proc_ssize_t>(run.size()), &mapped,
                                                static_cast<utf8proc_option_t>(options));
    const std::unique_ptr<uint8_t, decltype(&std::free)> owner(mapped, &std::free);
    BBB_CHECK(bytes >= 0, "a text of ", run.size(),
              " bytes cannot be normalized: ", utf8proc_errmsg(bytes));
    out.append(reinterpret_cast<const char*>(mapped), static_cast<size_t>(bytes));
  }
  return out;
}

}  // namespace

Normalizer::Normalizer(const json& spec, const std::string& source) {
  if (!spec.is_null()) add(spec, source);
}

void Normalizer::add(const json& spec, const std::string& source) {
  static const std::map<std::string, int> kForms = {
      {"NFC", UTF8PROC_STABLE | UTF8PROC_COMPOSE},
      {"NFD", UTF8PROC_STABLE | UTF8PROC_DECOMPOSE},
      {"NFKC", UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT},
      {"NFKD", UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT}};
  const std::string type = spec.is_object() ? spec.value("type", "") : spec.dump();
  if (type == "Sequence") {
    for (const json& step : spec.at("normalizers")) add(step, source);
  } else if (const auto form = kForms.find(type); form != kForms.end()) {
    steps_.push_back(
        [options = form->second](std::string_view text) { return unicode_form(text, options); });
  } else if (type == "Prepend") {
    steps_.push_back([prefix = spec.at("prepend").get<std::string>()](std::string_view text) {
      return text.empty() ? std::string() : prefix + std::string(text);
    });
  } else if (type == "Replace") {
    const json& pattern = spec.at("pattern");
    const std::string from = pattern.value("String", "");
    BBB_CHECK(!from.empty(), source,
              ": a Replace normalizer other than of a String is not supported");
    steps_.push_back([from, to = spec.at("content").get<std::string>()](std::string_view text) {
      return replaced(text, from, to);
    });
  } else {
    throw Error(cat(source, ": the normalizer ", printable(type), " is not supported"));
  }
}

std::string Normalizer::apply(std::string_view text) const {
  std::string out(text);
  for (const auto& step : steps_) out = step(out);
  return out;
}

}  // namespace bbb::data
