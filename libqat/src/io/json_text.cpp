#include "io/json_text.hpp"

#include <set>
#include <vector>

#include "io/text.hpp"
#include "qat/core/error.hpp"

namespace qat::io {

using nlohmann::json;

namespace {

/// Refuses keys that stand twice in an object, and nesting that is too deep. A pass of its own: the parser's
/// callback would take a time quadratic in the number of an object's members.
class Checker : public nlohmann::json_sax<json> {
 public:
  Checker(const std::string& subject, int max_depth)
      : subject_(subject), max_depth_(static_cast<std::size_t>(max_depth)) {}

  bool start_object(std::size_t) override { return open(); }
  bool start_array(std::size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    if (open_.back().insert(name).second) return true;
    throw FileError(subject_ + ": expected unique keys, got " + printable(name) + " twice");
  }

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  /// Told by the pass that makes the values.
  bool parse_error(std::size_t, const std::string&, const json::exception&) override { return false; }

 private:
  bool open() {
    if (open_.size() < max_depth_) {
      open_.emplace_back();
      return true;
    }
    throw FileError(subject_ + ": expected at most " + std::to_string(max_depth_) +
                    " levels of nesting, got more");
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& subject_;
  std::size_t max_depth_;
  std::vector<std::set<std::string>> open_;  ///< the keys of each open object; none of an array
};

}  // namespace

json parse_json(std::string_view text, const std::string& subject, int max_depth) {
  // The parser takes a NUL for the end of the input and would not look at what follows.
  if (const auto nul = text.find('\0'); nul != std::string_view::npos) {
    throw FileError(subject + ": expected JSON, got a NUL byte at byte " + std::to_string(nul));
  }
  Checker checker(subject, max_depth);
  json::sax_parse(text.begin(), text.end(), &checker);
  try {
    return json::parse(text.begin(), text.end());
  } catch (const json::parse_error& error) {
    throw FileError(subject + ": expected JSON, got a syntax error at byte " + std::to_string(error.byte));
  } catch (const json::exception&) {
    throw FileError(subject + ": expected JSON, got a number out of range");
  }
}

}  // namespace qat::io
