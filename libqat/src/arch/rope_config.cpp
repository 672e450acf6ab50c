#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "arch/config_reader.hpp"
#include "qat/core/error.hpp"

namespace qat::arch {

std::string quoted(std::string_view key) {
  return "\"" + std::string(key) + "\"";
}

std::string text_of(const ConfigValue& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return quoted(*text);
  if (const auto* number = std::get_if<double>(&value)) return std::to_string(*number);
  if (const auto* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
  return "nothing";
}

void fail_value(std::string_view key, const std::string& expected, const ConfigValue& got) {
  throw ArgumentError(quoted(key) + ": expected " + expected + ", got " + text_of(got));
}

namespace {

constexpr RopeType kTypes[] = {RopeType::kDefault, RopeType::kLinear, RopeType::kLlama3, RopeType::kYarn,
                               RopeType::kProportional};

[[noreturn]] void refuse(std::string_view key, const std::string& expected, const ConfigValue& got) {
  throw UnsupportedError(quoted(key) + ": expected " + expected + ", got " + text_of(got));
}

struct Found {
  std::string key;
  ConfigValue value;

  bool is_there() const { return arch::is_there(value); }
};

/// Where a configuration keeps one rotary embedding.
struct Places {
  std::vector<std::string> objects;  ///< with its fields
  std::vector<std::string> theta;    ///< its base
  std::vector<std::string> share;    ///< of the pairs that turn, besides the fields
};

const Places kOnly{{"rope_parameters.", "rope_scaling."},
                   {"rope_parameters.rope_theta", "rope_theta"},
                   {"partial_rotary_factor"}};
const Places kOfFullLayers{{"rope_parameters.full_attention.", "rope_scaling."},
                           {"rope_parameters.full_attention.rope_theta", "rope_theta"},
                           {}};
const Places kOfSlidingLayers{{"rope_parameters.sliding_attention."},
                              {"rope_parameters.sliding_attention.rope_theta", "rope_local_base_freq"},
                              {}};

/// Reads the fields of the scaling wherever the configuration keeps them.
class Reader {
 public:
  Reader(const ConfigLookup& lookup, const Places& places) : lookup_(lookup), places_(places) {}

  /// The first of the paths that is there; the first path with nothing otherwise.
  Found find(const std::vector<std::string>& paths) const {
    for (const std::string& path : paths) {
      ConfigValue value = lookup_(path);
      if (arch::is_there(value)) return {path, std::move(value)};
    }
    return {paths.front(), {}};
  }

  /// All paths of a field.
  std::vector<std::string> paths(const std::string& name) const {
    std::vector<std::string> all;
    for (const std::string& object : places_.objects) all.push_back(object + name);
    return all;
  }

  Found field(const std::string& name) const { return find(paths(name)); }
  const Places& places() const { return places_; }

  static double number(const Found& found) {
    const auto* value = std::get_if<double>(&found.value);
    if (value == nullptr) fail_value(found.key, "a number", found.value);
    return *value;
  }

  double required(const std::string& name) const { return number(field(name)); }

  double optional(const std::string& name, double fallback) const {
    const Found found = field(name);
    return found.is_there() ? number(found) : fallback;
  }

 private:
  const ConfigLookup& lookup_;
  const Places& places_;
};

RopeType parse_type(const Found& found) {
  const auto* name = std::get_if<std::string>(&found.value);
  if (name == nullptr) fail_value(found.key, "a string", found.value);
  for (const RopeType type : kTypes) {
    if (to_string(type) == *name) return type;
  }
  refuse(found.key, "\"default\", \"linear\", \"llama3\", \"yarn\" or \"proportional\"", found.value);
}

/// Files may spell the type four times; all of them must agree.
std::optional<RopeType> read_type(const Reader& reader) {
  std::optional<RopeType> type;
  for (const char* name : {"rope_type", "type"}) {
    for (const std::string& key : reader.paths(name)) {
      const Found found = reader.find({key});
      if (!found.is_there()) continue;
      const RopeType read = parse_type(found);
      if (type && *type != read) {
        refuse(key, "\"" + std::string(to_string(*type)) + "\" as another key says", found.value);
      }
      type = read;
    }
  }
  return type;
}

void read_share(const Reader& reader, Rope& rope) {
  std::vector<std::string> keys = reader.places().share;
  for (const std::string& key : reader.paths("partial_rotary_factor")) keys.push_back(key);
  for (const std::string& key : keys) {
    const Found share = reader.find({key});
    if (!share.is_there()) continue;
    const double value = Reader::number(share);
    if (rope.type == RopeType::kProportional) {
      rope.share = value;
    } else if (value != 1.0) {
      refuse(key, "1", share.value);
    }
  }
}

/// As transformers: a field beside the scaling, then one in it, then the model's context.
double read_original_context(const Reader& reader) {
  const std::string name = "original_max_position_embeddings";
  std::vector<std::string> keys = reader.paths(name);
  keys.insert(keys.begin(), name);
  keys.emplace_back("max_position_embeddings");
  return Reader::number(reader.find(keys));
}

double read_attention_factor(const Reader& reader, double factor) {
  const Found given = reader.field("attention_factor");
  if (given.is_there()) return Reader::number(given);
  const double over = reader.optional("mscale", 0.0), under = reader.optional("mscale_all_dim", 0.0);
  if (over == 0.0 || under == 0.0 || factor <= 1.0) return yarn_attention_factor(factor);
  return (0.1 * over * std::log(factor) + 1.0) / (0.1 * under * std::log(factor) + 1.0);
}

/// `fallback`: what holds when the configuration says neither a type nor a base.
Rope read(const Reader& reader, const Rope& fallback) {
  Rope rope;
  const Found theta = reader.find(reader.places().theta);
  rope.theta = theta.is_there() ? Reader::number(theta) : fallback.theta;
  const std::optional<RopeType> type = read_type(reader);
  if (!type && !theta.is_there()) {
    read_share(reader, rope = fallback);
    return rope;
  }
  rope.type = type.value_or(RopeType::kDefault);
  read_share(reader, rope);
  if (rope.type == RopeType::kProportional) rope.factor = reader.optional("factor", rope.factor);
  if (rope.type == RopeType::kLinear || rope.type == RopeType::kLlama3 || rope.type == RopeType::kYarn) {
    rope.factor = reader.required("factor");
  }
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

}  // namespace

Rope read_rope(const ConfigLookup& lookup) {
  return read(Reader(lookup, kOnly), {});
}

Rope read_rope(const ConfigLookup& lookup, RopeLayers layers, const Rope& fallback) {
  return read(Reader(lookup, layers == RopeLayers::kFull ? kOfFullLayers : kOfSlidingLayers), fallback);
}

}  // namespace qat::arch
