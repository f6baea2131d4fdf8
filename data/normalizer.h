// The `normalizer` of a tokenizer.json: rewrites a text before it is split into words.
#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace bbb::data {

class Normalizer {
 public:
  // The `normalizer` object: NFC, NFD, NFKC, NFKD, Prepend, Replace of a String, a Sequence of
  // these, or null. Throws, naming it, for anything else. `source` names the file in errors.
  Normalizer(const nlohmann::json& spec, const std::string& source);

  // Bytes that are not UTF-8 stay as they are.
  std::string apply(std::string_view text) const;
  bool empty() const { return steps_.empty(); }

 private:
  void add(const nlohmann::json& spec, const std::string& source);
  std::vector<std::function<std::string(std::string_view)>> steps_;
};

}  // namespace bbb::data
