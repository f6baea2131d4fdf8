#include "data/json.h"

#include <set>
#include <vector>

#include "data/files.h"
#include "quant/check.h"

namespace bbb::data {

nlohmann::json parse_json(const char* begin, const char* end, const std::string& where) {
  using Event = nlohmann::json::parse_event_t;
  std::vector<std::set<std::string>> keys;  // of each open object
  // The library keeps the last of two equal keys; a file that says two things is refused instead.
  const auto watch = [&](int depth, Event event, nlohmann::json& value) {
    BBB_CHECK(depth < 64, where, ": JSON nested too deeply");
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key) {
      const std::string& key = value.get_ref<const std::string&>();
      BBB_CHECK(keys.back().insert(key).second, where, ": '", printable(key), "' is given twice");
    }
    return true;
  };
  try {
    return nlohmann::json::parse(begin, end, watch);
  } catch (const nlohmann::json::parse_error& e) {
    throw Error(cat(where, ": malformed JSON at byte ", e.byte));
  } catch (const nlohmann::json::exception&) {  // a number out of every range
    throw Error(cat(where, ": malformed JSON"));
  }
}

nlohmann::json parse_json(const std::string& text, const std::string& where) {
  return parse_json(text.data(), text.data() + text.size(), where);
}

}  // namespace bbb::data
