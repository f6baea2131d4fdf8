#include "data/json.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "data/files.h"
#include "quant/check.h"

namespace bbb::data {
namespace {

constexpr std::pair<std::string_view, double> kLiterals[] = {
    {"NaN", NAN}, {"Infinity", INFINITY}, {"-Infinity", -INFINITY}};

// Whether a value can begin here.
bool can_begin(std::string_view text, size_t at) {
  return at == 0 || std::string_view(" \t\r\n:,[").find(text[at - 1]) != std::string_view::npos;
}

// Whether a literal occurs where a value can begin, inside a string or not. Words such as "isNaN"
// in a vocabulary do not count: they must not cost a copy of the text.
bool may_have_literals(std::string_view text) {
  for (const auto& [literal, value] : kLiterals) {
    for (size_t at = text.find(literal); at != text.npos; at = text.find(literal, at + 1))
      if (can_begin(text, at)) return true;
  }
  return false;
}

// For each number of the text, in order: the literal that it replaces, if any.
using Numbers = std::vector<std::optional<double>>;

// Overwrites each Python literal with the number 0 and spaces, so that all other bytes keep their
// positions.
Numbers replace_literals(std::string& text) {
  Numbers numbers;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string && c == '\\') {
      ++i;
      continue;
    }
    if (c == '"') in_string = !in_string;
    if (in_string || !can_begin(text, i)) continue;
    const std::string_view rest = std::string_view(text).substr(i);
    const auto* literal = std::find_if(std::begin(kLiterals), std::end(kLiterals),
                                       [&](const auto& l) { return rest.starts_with(l.first); });
    if (literal != std::end(kLiterals)) {
      numbers.push_back(literal->second);
      text.replace(i, literal->first.size(), literal->first.size(), ' ');
      text[i] = '0';
      i += literal->first.size() - 1;
    } else if (c == '-' || (c >= '0' && c <= '9')) {
      numbers.push_back(std::nullopt);
    }
  }
  return numbers;
}

template <typename Json>
Json parse(const char* begin, const char* end, const std::string& where) {
  using Event = typename Json::parse_event_t;
  const std::string_view view(begin, static_cast<size_t>(end - begin));
  std::string copy;
  Numbers numbers;
  if (may_have_literals(view)) {
    copy = view;
    numbers = replace_literals(copy);
    begin = copy.data();
    end = begin + copy.size();
  }
  size_t number = 0;
  std::vector<std::set<std::string>> keys;  // of each open object
  // The library would keep the last of two equal keys. Such a file is refused instead.
  const auto watch = [&](int depth, Event event, Json& value) {
    BBB_CHECK(depth < 64, where, ": JSON nested too deeply");
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key) {
      const std::string& key = value.template get_ref<const std::string&>();
      BBB_CHECK(keys.back().insert(key).second, where, ": '", printable(key), "' is given twice");
    }
    if (event == Event::value && value.is_number() && number < numbers.size())
      if (const std::optional<double>& literal = numbers[number++]) value = *literal;
    return true;
  };
  try {
    return Json::parse(begin, end, watch);
  } catch (const nlohmann::json::parse_error& e) {
    throw Error(
        cat(where, ": malformed JSON at byte ", e.byte, e.byte > view.size() ? kCutShort : ""));
  } catch (const nlohmann::json::exception&) {  // a number out of range
    throw Error(cat(where, ": malformed JSON"));
  }
}

}  // namespace

nlohmann::json parse_json(const char* begin, const char* end, const std::string& where) {
  return parse<nlohmann::json>(begin, end, where);
}

nlohmann::json parse_json(const std::string& text, const std::string& where) {
  return parse_json(text.data(), text.data() + text.size(), where);
}

nlohmann::ordered_json parse_ordered_json(const std::string& text, const std::string& where) {
  return parse<nlohmann::ordered_json>(text.data(), text.data() + text.size(), where);
}

}  // namespace bbb::data
