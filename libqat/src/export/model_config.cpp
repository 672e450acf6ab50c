#include "export/model_config.hpp"

#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "export/input_file.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

using arch::Absent;
using arch::Condition;
using arch::ValueType;
using nlohmann::json;

[[noreturn]] void fail(std::string_view key, const std::string& expected, const json& got) {
  throw ArgumentError("export_checkpoint: config: " + std::string(key) + ": expected " + expected + ", got " +
                      shown(got));
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

/// As arch::read_rope asks for values.
arch::ConfigValue config_value(const json& value, std::string_view path) {
  if (value.is_null()) return {};
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_number()) return value.get<double>();
  if (value.is_string()) return value.get<std::string>();
  fail(path, "a number, a string or true or false", value);
}

}  // namespace

ModelConfig::ModelConfig(const std::string& text)
    : root_(std::make_shared<json>(json::parse(text, nullptr, false))) {
  if (text.empty() || !root_->is_object()) {
    throw ArgumentError(
        "export_checkpoint: config: expected the model's configuration as a JSON object, got " +
        std::string(text.empty() ? "none" : "something else"));
  }
  const json& type = find("model_type");
  if (!type.is_string()) fail("model_type", "a string", type);
  family_ = &arch::find_by_model_type(type.get_ref<const std::string&>());
  read_rope();
}

void ModelConfig::read_rope() {
  const std::string prefix = "export_checkpoint: config: ";
  try {
    rope_ = arch::read_rope([this](std::string_view path) { return config_value(find(path), path); });
  } catch (const UnsupportedError& error) {
    throw UnsupportedError(prefix + error.what());
  } catch (const ArgumentError& error) {
    throw ArgumentError(prefix + error.what());
  }
  if (rope_.type == arch::RopeType::kLlama3 && !arch::matches_any(family_->gguf_only, arch::kRopeDivisors)) {
    throw UnsupportedError(prefix + "rope_type: expected \"default\", \"linear\" or \"yarn\" for " +
                           std::string(family_->name) +
                           ", whose GGUF files hold no divisors, got \"llama3\"");
  }
}

const json& ModelConfig::find(std::string_view path) const {
  const json* node = root_.get();
  for (std::size_t dot = path.find('.'); dot != std::string_view::npos; dot = path.find('.')) {
    node = &field(*node, path.substr(0, dot));
    path.remove_prefix(dot + 1);
  }
  return field(*node, path);
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

std::string ModelConfig::name() const {
  const json& path = find("_name_or_path");
  if (!path.is_string()) return "";
  const auto& text = path.get_ref<const std::string&>();
  return text.substr(text.find_last_of('/') + 1);
}

json ModelConfig::value_of(const arch::ConfigKey& key) const {
  if (key.condition == Condition::kExplicitHeadDim && find("head_dim").is_null()) return {};
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
      return rope_.theta;
  }
  return {};
}

io::GgufMetadata ModelConfig::gguf_keys() const {
  io::GgufMetadata keys;
  for (const arch::ConfigKey& key : family_->config) {
    const json value = value_of(key);
    if (!value.is_null()) keys.set(key.gguf, to_gguf(key.hf.front(), key.type, value));
  }
  add_rope_scaling(keys);
  return keys;
}

/// The divisors of llama3 are a tensor instead.
void ModelConfig::add_rope_scaling(io::GgufMetadata& keys) const {
  if (rope_.type != arch::RopeType::kLinear && rope_.type != arch::RopeType::kYarn) return;
  const auto set = [&](std::string_view key, io::GgufValue value) {
    keys.set(std::string(family_->gguf_architecture) + ".rope.scaling." + std::string(key), std::move(value));
  };
  set(arch::rope_key::kType, std::string(arch::to_string(rope_.type)));
  set(arch::rope_key::kFactor, static_cast<float>(rope_.factor));
  if (rope_.type == arch::RopeType::kLinear) return;
  if (rope_.original_context > std::numeric_limits<uint32_t>::max()) {
    fail("original_max_position_embeddings", "a whole number of 32 bits", rope_.original_context);
  }
  set(arch::rope_key::kOriginalContext, static_cast<uint32_t>(rope_.original_context));
  const arch::Rope usual;
  if (rope_.beta_fast != usual.beta_fast || rope_.beta_slow != usual.beta_slow) {
    throw UnsupportedError(
        "export_checkpoint: config: beta_fast, beta_slow: expected 32 and 1, the borders that llama.cpp "
        "takes for this architecture, got others");
  }
  const auto share = static_cast<float>(rope_.attention_factor / arch::yarn_attention_factor(rope_.factor));
  if (share != 1.0F) set(arch::rope_key::kAttentionFactor, share);
}

std::vector<float> ModelConfig::rope_divisors() const {
  if (rope_.type != arch::RopeType::kLlama3) return {};
  std::vector<float> divisors;
  for (const double divisor : arch::rope_divisors(rope_, head_dim())) {
    divisors.push_back(static_cast<float>(divisor));
  }
  return divisors;
}

}  // namespace qat
