#include <cmath>
#include <initializer_list>
#include <utility>

#include "qat/arch/rope.hpp"
#include "qat/core/error.hpp"

namespace qat::arch {
namespace {

constexpr RopeType kTypes[] = {RopeType::kDefault, RopeType::kLinear, RopeType::kLlama3, RopeType::kYarn};

std::string quoted(std::string_view key) {
  return "\"" + std::string(key) + "\"";
}

std::string text_of(const ConfigValue& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return quoted(*text);
  if (const auto* number = std::get_if<double>(&value)) return std::to_string(*number);
  if (const auto* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
  return "nothing";
}

[[noreturn]] void fail(std::string_view key, const std::string& expected, const ConfigValue& got) {
  throw ArgumentError(quoted(key) + ": expected " + expected + ", got " + text_of(got));
}

[[noreturn]] void refuse(std::string_view key, const std::string& expected, const ConfigValue& got) {
  throw UnsupportedError(quoted(key) + ": expected " + expected + ", got " + text_of(got));
}

struct Found {
  std::string key;
  ConfigValue value;

  bool is_there() const { return !std::holds_alternative<std::monostate>(value); }
};

/// Reads the fields of the scaling wherever the configuration keeps them.
class Reader {
 public:
  explicit Reader(const ConfigLookup& lookup) : lookup_(lookup) {}

  /// The first of the paths that is there; the first path with nothing otherwise.
  Found find(std::initializer_list<std::string> paths) const {
    for (const std::string& path : paths) {
      ConfigValue value = lookup_(path);
      if (!std::holds_alternative<std::monostate>(value)) return {path, std::move(value)};
    }
    return {*paths.begin(), {}};
  }

  Found field(const std::string& name) const {
    return find({"rope_parameters." + name, "rope_scaling." + name});
  }

  static double number(const Found& found) {
    const auto* value = std::get_if<double>(&found.value);
    if (value == nullptr) fail(found.key, "a number", found.value);
    return *value;
  }

  double required(const std::string& name) const { return number(field(name)); }

  double optional(const std::string& name, double fallback) const {
    const Found found = field(name);
    return found.is_there() ? number(found) : fallback;
  }

 private:
  const ConfigLookup& lookup_;
};

RopeType parse_type(const Found& found) {
  if (!found.is_there()) return RopeType::kDefault;
  const auto* name = std::get_if<std::string>(&found.value);
  if (name == nullptr) fail(found.key, "a string", found.value);
  for (const RopeType type : kTypes) {
    if (to_string(type) == *name) return type;
  }
  refuse(found.key, "\"default\", \"linear\", \"llama3\" or \"yarn\"", found.value);
}

/// Files may spell the type four times; all of them must agree.
RopeType read_type(const Reader& reader) {
  std::optional<RopeType> type;
  for (const char* key :
       {"rope_parameters.rope_type", "rope_parameters.type", "rope_scaling.rope_type", "rope_scaling.type"}) {
    const Found found = reader.find({key});
    if (!found.is_there()) continue;
    const RopeType read = parse_type(found);
    if (type && *type != read) {
      refuse(key, "\"" + std::string(to_string(*type)) + "\" as another key says", found.value);
    }
    type = read;
  }
  return type.value_or(RopeType::kDefault);
}

/// As transformers: a field beside the scaling, then one in it, then the model's context.
double read_original_context(const Reader& reader) {
  const std::string name = "original_max_position_embeddings";
  const Found found =
      reader.find({name, "rope_parameters." + name, "rope_scaling." + name, "max_position_embeddings"});
  return Reader::number(found);
}

double read_attention_factor(const Reader& reader, double factor) {
  const Found given = reader.field("attention_factor");
  if (given.is_there()) return Reader::number(given);
  const double over = reader.optional("mscale", 0.0), under = reader.optional("mscale_all_dim", 0.0);
  if (over == 0.0 || under == 0.0 || factor <= 1.0) return yarn_attention_factor(factor);
  return (0.1 * over * std::log(factor) + 1.0) / (0.1 * under * std::log(factor) + 1.0);
}

}  // namespace

Rope read_rope(const ConfigLookup& lookup) {
  const Reader reader(lookup);
  Rope rope;
  const Found theta = reader.find({"rope_parameters.rope_theta", "rope_theta"});
  if (theta.is_there()) rope.theta = Reader::number(theta);
  for (const char* key : {"partial_rotary_factor", "rope_parameters.partial_rotary_factor",
                          "rope_scaling.partial_rotary_factor"}) {
    const Found share = reader.find({key});
    if (share.is_there() && Reader::number(share) != 1.0) refuse(key, "1", share.value);
  }
  rope.type = read_type(reader);
  if (rope.type != RopeType::kDefault) rope.factor = reader.required("factor");
  if (rope.type == RopeType::kLlama3 || rope.type == RopeType::kYarn) {
    rope.original_context = read_original_context(reader);
  }
  if (rope.type == RopeType::kLlama3) {
    rope.low_freq_factor = reader.required("low_freq_factor");
    rope.high_freq_factor = reader.required("high_freq_factor");
  }
  if (rope.type == RopeType::kYarn) {
    const Found truncate = reader.field("truncate");
    if (truncate.is_there() && truncate.value != ConfigValue(true)) {
      refuse(truncate.key, "true", truncate.value);
    }
    rope.beta_fast = reader.optional("beta_fast", rope.beta_fast);
    rope.beta_slow = reader.optional("beta_slow", rope.beta_slow);
    rope.attention_factor = read_attention_factor(reader, rope.factor);
  }
  validate(rope);
  return rope;
}

}  // namespace qat::arch
