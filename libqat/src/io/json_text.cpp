#include "io/json_text.hpp"

#include <set>
#include <vector>

#include "io/text.hpp"
#include "qat/core/error.hpp"

namespace qat::io {

using nlohmann::json;

json parse_json(std::string_view text, const std::string& subject, int max_depth) {
  // The parser takes a NUL for the end of the input and would not look at what follows.
  if (const auto nul = text.find('\0'); nul != std::string_view::npos) {
    throw FileError(subject + ": expected JSON, got a NUL byte at byte " + std::to_string(nul));
  }
  std::vector<std::set<std::string>> open_objects;
  const json::parser_callback_t check = [&](int depth, json::parse_event_t event, json& parsed) {
    using Event = json::parse_event_t;
    if ((event == Event::object_start || event == Event::array_start) && depth >= max_depth) {
      throw FileError(subject + ": expected at most " + std::to_string(max_depth) +
                      " levels of nesting, got more");
    }
    if (event == Event::object_start) open_objects.emplace_back();
    if (event == Event::object_end) open_objects.pop_back();
    if (event == Event::key && !open_objects.back().insert(parsed.get_ref<const std::string&>()).second) {
      throw FileError(subject + ": expected unique keys, got " +
                      printable(parsed.get_ref<const std::string&>()) + " twice");
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), check);
  } catch (const json::parse_error& error) {
    throw FileError(subject + ": expected JSON, got a syntax error at byte " + std::to_string(error.byte));
  } catch (const json::exception&) {
    throw FileError(subject + ": expected JSON, got a number out of range");
  }
}

}  // namespace qat::io
