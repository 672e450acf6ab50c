#include "export/model_config.hpp"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <numbers>

#include "export/input_file.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

using arch::Absent;
using arch::Condition;
using arch::ValueType;
using nlohmann::json;

// Where configurations keep the rotary embedding: transformers 5 first, then older spellings.
const std::vector<std::string_view> kRopeType{"rope_parameters.rope_type", "rope_scaling.rope_type",
                                              "rope_scaling.type"};
const std::vector<std::string_view> kRopeTheta{"rope_parameters.rope_theta", "rope_theta"};
constexpr const char* kRopeDivisors = "rope_freqs.weight";
constexpr double kDefaultRopeTheta = 10000.0;

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

double ModelConfig::number(const std::vector<std::string_view>& paths) const {
  const json& value = find(paths);
  if (!value.is_number()) fail(paths.front(), "a number", value);
  return value.get<double>();
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

std::string ModelConfig::rope_type() const {
  const json& type = find(kRopeType);
  return type.is_string() ? type.get<std::string>() : "default";
}

json ModelConfig::value_of(const arch::ConfigKey& key) const {
  const std::string rope = rope_type();
  if (key.condition == Condition::kExplicitHeadDim && find("head_dim").is_null()) return {};
  if (key.condition == Condition::kScaledRope && rope != "linear" && rope != "yarn") return {};
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
      return kDefaultRopeTheta;
  }
  return {};
}

io::GgufMetadata ModelConfig::gguf_keys() const {
  const std::string rope = rope_type();
  const bool divisors = rope == "llama3" && arch::matches_any(family_->gguf_only, kRopeDivisors);
  if (!divisors && rope != "default" && rope != "linear" && rope != "yarn") {
    throw UnsupportedError(
        "export_checkpoint: config: rope_type: expected default, linear, yarn or llama3, got " + rope);
  }
  io::GgufMetadata keys;
  for (const arch::ConfigKey& key : family_->config) {
    const json value = value_of(key);
    if (!value.is_null()) keys.set(std::string(key.gguf), to_gguf(key.hf.front(), key.type, value));
  }
  return keys;
}

std::vector<float> ModelConfig::rope_divisors() const {
  if (rope_type() != "llama3") return {};
  const auto parameter = [this](const char* name) {
    const std::string current = std::string("rope_parameters.") + name,
                      old = std::string("rope_scaling.") + name;
    return number({current, old});
  };
  const double factor = parameter("factor"), context = parameter("original_max_position_embeddings");
  const double low = parameter("low_freq_factor"), high = parameter("high_freq_factor");
  const double theta = find(kRopeTheta).is_null() ? kDefaultRopeTheta : number(kRopeTheta);
  const int64_t size = head_dim();
  std::vector<float> divisors;
  for (int64_t i = 0; i < size; i += 2) {
    const double wavelength =
        2 * std::numbers::pi * std::pow(theta, static_cast<double>(i) / static_cast<double>(size));
    double divisor = 1.0;
    if (wavelength > context / low) {
      divisor = factor;
    } else if (wavelength >= context / high) {
      const double smooth = (context / wavelength - low) / (high - low);
      divisor = 1.0 / ((1.0 - smooth) / factor + smooth);
    }
    divisors.push_back(static_cast<float>(divisor));
  }
  return divisors;
}

}  // namespace qat
