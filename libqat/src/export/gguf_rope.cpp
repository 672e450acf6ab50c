#include "export/gguf_rope.hpp"

#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "qat/core/error.hpp"
#include "qat/grid/ggml.hpp"
#include "qat/grid/stored.hpp"

namespace qat {
namespace {

using Json = nlohmann::ordered_json;
using arch::RopeType;

/// The keys of one file behind "<architecture>.rope.scaling.".
class ScalingKeys {
 public:
  ScalingKeys(const std::string& where, const io::GgufFile& file, const arch::Family& family)
      : where_(where), file_(file), prefix_(std::string(family.gguf_architecture) + ".rope.scaling.") {}

  std::string name(std::string_view key) const { return prefix_ + std::string(key); }
  bool has(std::string_view key) const { return file_.metadata().find(name(key)) != nullptr; }
  double number(std::string_view key) const {
    return shortest(static_cast<float>(file_.get_number(name(key))));
  }
  double number_or(std::string_view key, double fallback) const { return has(key) ? number(key) : fallback; }

  /// A factor of 0 or 1 scales nothing, whatever the type; a factor without a type is llama.cpp's "linear".
  RopeType type() const {
    const std::string type =
        has(arch::rope_key::kType) ? file_.get<std::string>(name(arch::rope_key::kType)) : "linear";
    if (type == "none") return RopeType::kDefault;
    if (type == "linear") {
      const double factor = number_or(arch::rope_key::kFactor, 0.0);
      return factor == 0.0 || factor == 1.0 ? RopeType::kDefault : RopeType::kLinear;
    }
    if (type == "yarn") return RopeType::kYarn;
    throw UnsupportedError(where_ + name(arch::rope_key::kType) +
                           ": expected \"none\", \"linear\" or \"yarn\", got \"" + type + "\"");
  }

 private:
  const std::string& where_;
  const io::GgufFile& file_;
  std::string prefix_;
};

/// The divisors as float32, or nothing when the file has none that matter.
std::vector<float> read_divisors(const std::string& where, const io::GgufFile& file,
                                 const arch::Family& family) {
  const io::GgufTensor* tensor = file.find_tensor(arch::kRopeDivisors);
  if (tensor == nullptr || !arch::matches_any(family.gguf_only, arch::kRopeDivisors)) return {};
  const grid::GgmlType* type = grid::ggml_type(tensor->type);
  if (type == nullptr || type->unpack != nullptr || tensor->dims.size() != 1) {
    throw UnsupportedError(where + tensor->name + ": expected a vector of floats, got another tensor");
  }
  std::vector<float> divisors;
  const auto* bytes = reinterpret_cast<const uint8_t*>(tensor->data.data());
  for (int64_t i = 0; i < tensor->dims.front(); ++i) {
    divisors.push_back(grid::get_stored(bytes + i * type->bytes, grid::find(type->grid).info().dtype));
  }
  return divisors;
}

arch::Rope rope_of(const std::string& where, const std::vector<float>& divisors, double theta) {
  const auto rope = arch::rope_of_divisors(divisors, theta);
  if (rope) return *rope;
  throw UnsupportedError(
      where + std::string(arch::kRopeDivisors) +
      ": expected the divisors of a \"linear\", \"llama3\" or \"proportional\" rotary embedding, got others");
}

}  // namespace

double shortest(float value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value).ptr;
  double result = value;
  std::from_chars(text, end, result);
  return result;
}

arch::Rope read_gguf_rope(const std::string& where, const io::GgufFile& file, const arch::Family& family,
                          double theta) {
  const ScalingKeys keys(where, file, family);
  const std::vector<float> divisors = read_divisors(where, file, family);
  const arch::Rope plain{.theta = theta};
  const arch::Rope divided = divisors.empty() ? plain : rope_of(where, divisors, theta);
  arch::Rope rope = plain;
  rope.type = keys.type();
  if (rope.type == RopeType::kDefault) return divided;
  if (divided.type != RopeType::kDefault) {
    throw UnsupportedError(where + keys.name(arch::rope_key::kType) + ": expected \"none\" beside " +
                           std::string(arch::kRopeDivisors) + ", got \"" +
                           std::string(arch::to_string(rope.type)) + "\"");
  }
  rope.factor = keys.number(arch::rope_key::kFactor);
  if (rope.type == RopeType::kLinear) return rope;
  rope.original_context = keys.has(arch::rope_key::kOriginalContext)
                              ? keys.number(arch::rope_key::kOriginalContext)
                              : file.get_number(std::string(family.gguf_architecture) + ".context_length");
  rope.attention_factor =
      arch::yarn_attention_factor(rope.factor) * keys.number_or(arch::rope_key::kAttentionFactor, 1.0);
  return rope;
}

Json rope_parameters(const arch::Rope& rope) {
  Json json{{"rope_type", arch::to_string(rope.type)}, {"rope_theta", rope.theta}};
  if (rope.type == RopeType::kDefault) return json;
  if (rope.type == RopeType::kProportional) {
    json["partial_rotary_factor"] = rope.share;
    if (rope.factor != 1.0) json["factor"] = rope.factor;
    return json;
  }
  json["factor"] = rope.factor;
  if (rope.type == RopeType::kLinear) return json;
  json["original_max_position_embeddings"] = std::llround(rope.original_context);
  if (rope.type == RopeType::kLlama3) {
    json["low_freq_factor"] = rope.low_freq_factor;
    json["high_freq_factor"] = rope.high_freq_factor;
    return json;
  }
  json["attention_factor"] = rope.attention_factor;
  return json;
}

}  // namespace qat
