#include "export/model_config.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "export/config_lookup.hpp"
#include "export/input_file.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

using arch::Absent;
using arch::Condition;
using arch::Implied;
using arch::PerLayer;
using arch::ValueType;
using nlohmann::json;

constexpr const char* kPrefix = "export_checkpoint: config: ";

[[noreturn]] void fail(std::string_view key, const std::string& expected, const json& got) {
  throw ArgumentError(kPrefix + std::string(key) + ": expected " + expected + ", got " + shown(got));
}

[[noreturn]] void refuse(std::string_view key, const std::string& expected, const json& got) {
  throw UnsupportedError(kPrefix + std::string(key) + ": expected " + expected + ", got " + shown(got));
}

io::GgufValue to_gguf(std::string_view path, ValueType type, const json& value) {
  switch (type) {
    case ValueType::kU32:
      if (!value.is_number_unsigned() || value.get<uint64_t>() > std::numeric_limits<uint32_t>::max()) break;
      return value.get<uint32_t>();
    case ValueType::kF32:
      if (!value.is_number()) break;
      return value.get<float>();
    case ValueType::kBool:
      if (!value.is_boolean()) break;
      return value.get<bool>();
    case ValueType::kString:
      if (!value.is_string()) break;
      return value.get<std::string>();
  }
  constexpr const char* kNames[] = {"a whole number of 32 bits", "a number", "true or false", "a string"};
  fail(path, kNames[static_cast<int>(type)], value);
}

json to_json(const arch::ConfigValue& value) {
  if (const auto* flag = std::get_if<bool>(&value)) return *flag;
  if (const auto* text = std::get_if<std::string>(&value)) return *text;
  const double number = std::get<double>(value);
  if (number >= 0 && number == std::floor(number)) return static_cast<uint64_t>(number);
  return number;
}

/// Errors of arch name the key alone.
template <class Call>
auto in_config(Call call) {
  try {
    return call();
  } catch (const UnsupportedError& error) {
    throw UnsupportedError(kPrefix + std::string(error.what()));
  } catch (const ArgumentError& error) {
    throw ArgumentError(kPrefix + std::string(error.what()));
  }
}

/// The object that describes the decoder, completed by the family's defaults.
json decoder_of(const json& root, const arch::Family& family) {
  const json& text = field(root, "text_config");
  json decoder = text.is_object() ? text : root;
  for (const auto& [key, value] : family.defaults) {
    json& place = decoder[std::string(key)];
    if (place.is_null()) place = to_json(value);
  }
  return decoder;
}

}  // namespace

ModelConfig::ModelConfig(const std::string& text) {
  const json root = json::parse(text, nullptr, false);
  if (text.empty() || !root.is_object()) {
    throw ArgumentError(kPrefix + std::string("expected the model's configuration as a JSON object, got ") +
                        (text.empty() ? "none" : "something else"));
  }
  const json& type = field(root, "model_type");
  if (!type.is_string()) fail("model_type", "a string", type);
  family_ = &arch::find_by_model_type(type.get_ref<const std::string&>());
  if (field(root, "_name_or_path").is_string()) name_ = field(root, "_name_or_path").get<std::string>();
  name_ = name_.substr(name_.find_last_of('/') + 1);
  decoder_ = std::make_shared<const json>(decoder_of(root, *family_));
  const arch::ConfigLookup lookup = lookup_in(*decoder_);
  ropes_ = in_config([&] { return arch::read_ropes(*family_, lookup); });
  check_ropes();
  shape_ = in_config([&] { return arch::read_shape(*family_, lookup); });
  check_implied();
  check_layers();
}

void ModelConfig::check_ropes() const {
  using arch::RopeType;
  const bool divisors = arch::matches_any(family_->gguf_only, arch::kRopeDivisors);
  const RopeType type = ropes_.full.type;
  if (!divisors && (type == RopeType::kLlama3 || type == RopeType::kProportional)) {
    refuse("rope_type",
           "\"default\", \"linear\" or \"yarn\" for " + std::string(family_->name) +
               ", whose GGUF files hold no divisors",
           std::string(arch::to_string(type)));
  }
  if (!family_->sliding_rope) return;
  if (ropes_.sliding.type != RopeType::kDefault) {
    refuse("rope_parameters.sliding_attention.rope_type", "\"default\", which is what llama.cpp computes",
           std::string(arch::to_string(ropes_.sliding.type)));
  }
  if (type == RopeType::kYarn) {
    refuse("rope_parameters.full_attention.rope_type",
           "another type, which llama.cpp applies to these layers alone", std::string(arch::to_string(type)));
  }
}

/// llama.cpp computes nothing else, whatever the configuration says.
void ModelConfig::check_implied() const {
  const json& activation = find(family_->activation_key);
  if (!activation.is_null() && activation != family_->activation) {
    refuse(family_->activation_key, "\"" + std::string(family_->activation) + "\"", activation);
  }
  for (const arch::ImpliedKey& key : family_->implied) {
    const json& value = find(key.hf);
    const bool off = value.is_null() || value == false;
    if (key.value == Implied::kOff && !off) refuse(key.hf, "false or null", value);
    if (key.value == Implied::kCausal && !off && value != "vision")
      refuse(key.hf, "null or \"vision\"", value);
    if (key.value != Implied::kAttentionScalar) continue;
    const int64_t scalar = arch::attention_scalar(shape_, integer("hidden_size"), query_heads());
    if (value != scalar) {
      refuse(key.hf, std::to_string(scalar) + ", which is what llama.cpp computes", value);
    }
  }
}

/// llama.cpp wants a layer with a window in families that have them. For shared keys it does not look for a
/// layer of the same kind: it takes the last unshared one for layers without a window and the one before for
/// the others.
void ModelConfig::check_layers() const {
  const int64_t count = layers();
  if (family_->sliding_rope && shape_.sliding_window == 0) {
    refuse("layer_types", "a layer with a sliding window, without which llama.cpp loads no such model",
           "none");
  }
  int64_t first = 0;
  while (first < count && shape_.owns_keys(first)) ++first;
  for (int64_t layer = first; layer < count; ++layer) {
    const arch::LayerShape& shape = shape_.layers[static_cast<std::size_t>(layer)];
    if (shape.key_source == (shape.sliding ? first - 2 : first - 1)) continue;
    refuse("layer_types",
           "a layer with a sliding window and then one without before the layers that share keys, where "
           "llama.cpp looks for them",
           "others");
  }
}

const json& ModelConfig::find(std::string_view path) const {
  return find_path(*decoder_, path);
}

void ModelConfig::cut_vocabulary(int64_t rows) {
  json decoder = *decoder_;
  decoder["vocab_size"] = static_cast<uint64_t>(rows);
  decoder_ = std::make_shared<const json>(std::move(decoder));
}

const json& ModelConfig::find(const std::vector<std::string_view>& paths) const {
  for (const std::string_view path : paths) {
    const json& value = find(path);
    if (!value.is_null()) return value;
  }
  return find(paths.front());
}

int64_t ModelConfig::integer(std::string_view path) const {
  const json& value = find(path);
  if (!value.is_number_unsigned() || value.get<uint64_t>() == 0) fail(path, "a whole number above 0", value);
  return static_cast<int64_t>(std::get<uint32_t>(to_gguf(path, ValueType::kU32, value)));
}

int64_t ModelConfig::key_heads() const {
  return find("num_key_value_heads").is_null() ? query_heads() : integer("num_key_value_heads");
}

int64_t ModelConfig::head_dim() const {
  return find("head_dim").is_null() ? integer("hidden_size") / query_heads() : integer("head_dim");
}

json ModelConfig::value_of(const arch::ConfigKey& key) const {
  if (key.condition == Condition::kExplicitHeadDim && find("head_dim").is_null()) return {};
  if (key.condition == Condition::kExperts && shape_.experts == 0) return {};
  const json& value = find(key.hf);
  if (!value.is_null()) return value;
  switch (key.absent) {
    case Absent::kError:
      fail(key.hf.front(), "a value", value);
    case Absent::kOmit:
      return {};
    case Absent::kQueryHeads:
      return static_cast<uint64_t>(query_heads());
    case Absent::kHeadDim:
      return static_cast<uint64_t>(head_dim());
    case Absent::kRopeBase:
      return ropes_.full.theta;
    case Absent::kSlidingRopeBase:
      return ropes_.sliding.theta;
    case Absent::kZero:
      return uint64_t{0};
  }
  return {};
}

std::optional<io::GgufValue> ModelConfig::per_layer(const arch::ConfigKey& key) const {
  const auto& layers = shape_.layers;
  const auto numbers = [&](int64_t arch::LayerShape::* number) -> io::GgufValue {
    const int64_t first = layers.front().*number;
    const bool same =
        std::all_of(layers.begin(), layers.end(), [&](const auto& layer) { return layer.*number == first; });
    if (same) return static_cast<uint32_t>(first);
    std::vector<int32_t> all;
    for (const arch::LayerShape& layer : layers) all.push_back(static_cast<int32_t>(layer.*number));
    return all;
  };
  switch (key.per_layer) {
    case PerLayer::kNone:
      break;
    case PerLayer::kSliding: {
      std::vector<bool> all;
      for (const arch::LayerShape& layer : layers) all.push_back(layer.sliding);
      return all;
    }
    case PerLayer::kFullEvery: {
      const int64_t period = arch::full_every(shape_);
      if (period == 0) refuse(key.hf.front(), "each n-th layer without a sliding window", "another order");
      if (period == family_->layers.full_every) return std::nullopt;
      return static_cast<uint32_t>(period);
    }
    case PerLayer::kKeyHeads:
      return numbers(&arch::LayerShape::key_heads);
    case PerLayer::kFeedForward:
      return numbers(&arch::LayerShape::feed_forward);
    case PerLayer::kFullHeadDim:
      return static_cast<uint32_t>(arch::full_head_dim(shape_));
  }
  return std::nullopt;
}

io::GgufMetadata ModelConfig::gguf_keys() const {
  io::GgufMetadata keys;
  for (const arch::ConfigKey& key : family_->config) {
    if (key.per_layer != PerLayer::kNone) {
      if (auto value = per_layer(key)) keys.set(key.gguf, *std::move(value));
      continue;
    }
    const json value = value_of(key);
    if (!value.is_null()) keys.set(key.gguf, to_gguf(key.hf.front(), key.type, value));
  }
  add_rope_scaling(keys);
  return keys;
}

/// Other scalings are a tensor of divisors instead.
void ModelConfig::add_rope_scaling(io::GgufMetadata& keys) const {
  const arch::Rope& rope = ropes_.full;
  if (family_->always_divisors) return;
  if (rope.type != arch::RopeType::kLinear && rope.type != arch::RopeType::kYarn) return;
  const auto set = [&](std::string_view key, io::GgufValue value) {
    keys.set(std::string(family_->gguf_architecture) + ".rope.scaling." + std::string(key), std::move(value));
  };
  set(arch::rope_key::kType, std::string(arch::to_string(rope.type)));
  set(arch::rope_key::kFactor, static_cast<float>(rope.factor));
  if (rope.type == arch::RopeType::kLinear) return;
  if (rope.original_context > std::numeric_limits<uint32_t>::max()) {
    fail("original_max_position_embeddings", "a whole number of 32 bits", rope.original_context);
  }
  set(arch::rope_key::kOriginalContext, static_cast<uint32_t>(rope.original_context));
  const arch::Rope usual;
  if (rope.beta_fast != usual.beta_fast || rope.beta_slow != usual.beta_slow) {
    throw UnsupportedError(
        "export_checkpoint: config: beta_fast, beta_slow: expected 32 and 1, the borders that llama.cpp "
        "takes for this architecture, got others");
  }
  const auto share = static_cast<float>(rope.attention_factor / arch::yarn_attention_factor(rope.factor));
  if (share != 1.0F) set(arch::rope_key::kAttentionFactor, share);
}

std::vector<float> ModelConfig::rope_divisors() const {
  if (!family_->always_divisors && ropes_.full.type != arch::RopeType::kLlama3) return {};
  std::vector<float> divisors;
  for (const double divisor : arch::rope_divisors(ropes_.full, arch::full_head_dim(shape_))) {
    divisors.push_back(static_cast<float>(divisor));
  }
  return divisors;
}

}  // namespace qat
