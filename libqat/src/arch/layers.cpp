#include "qat/arch/layers.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "arch/config_reader.hpp"
#include "qat/core/error.hpp"

namespace qat::arch {
namespace {

constexpr const char* kSliding = "sliding_attention";
constexpr const char* kFull = "full_attention";

/// Sizes beyond this are a broken file, not a model; it also keeps products of two sizes within int64.
constexpr double kMaxSize = 2147483648.0;
/// A list per layer is made of this many.
constexpr std::int64_t kMaxLayers = 4096;

/// Reads what the layers need, one field at a time.
class Reader {
 public:
  Reader(const Family& family, const ConfigLookup& lookup) : family_(family), lookup_(lookup) {}

  bool has(const std::string& key) const { return is_there(lookup_(key)); }

  std::optional<std::int64_t> find_size(const std::string& key, double least = 1.0) const {
    const ConfigValue value = lookup_(key);
    if (!is_there(value)) return std::nullopt;
    const auto* number = std::get_if<double>(&value);
    if (number == nullptr || *number != std::floor(*number) || *number < least || *number > kMaxSize) {
      fail_value(key, least == 0.0 ? "a whole number" : "a whole number above 0", value);
    }
    return static_cast<std::int64_t>(*number);
  }

  std::int64_t size(const std::string& key, double least = 1.0) const {
    const auto value = find_size(key, least);
    if (!value) fail_value(key, "a whole number", {});
    return *value;
  }

  bool flag(const std::string& key) const {
    const ConfigValue value = lookup_(key);
    if (!is_there(value)) return false;
    const auto* set = std::get_if<bool>(&value);
    if (set == nullptr) fail_value(key, "true or false", value);
    return *set;
  }

  std::int64_t layers() const {
    const std::int64_t count = size("num_hidden_layers");
    if (count > kMaxLayers) {
      fail_value("num_hidden_layers", "at most " + std::to_string(kMaxLayers), static_cast<double>(count));
    }
    return count;
  }

  /// Whether each layer has a window.
  std::vector<bool> windows(std::int64_t count) const {
    std::vector<bool> sliding = has("layer_types.0") ? listed(count) : periodic(count);
    if (family_.layers.ends_full) sliding.back() = false;
    return sliding;
  }

  /// An override for one layer, as transformers 5 writes it.
  std::optional<std::int64_t> override_of(std::int64_t layer, const char* key) const {
    return find_size("per_layer_config." + std::to_string(layer) + "." + key);
  }

 private:
  std::vector<bool> listed(std::int64_t count) const {
    std::vector<bool> sliding;
    for (std::int64_t layer = 0; layer < count; ++layer) {
      const std::string key = "layer_types." + std::to_string(layer);
      const ConfigValue value = lookup_(key);
      const auto* type = std::get_if<std::string>(&value);
      if (type == nullptr) fail_value(key, "the kind of each of " + std::to_string(count) + " layers", value);
      if (*type != kSliding && *type != kFull) {
        throw UnsupportedError(quoted(key) + ": expected \"sliding_attention\" or \"full_attention\", got " +
                               text_of(value));
      }
      sliding.push_back(*type == kSliding);
    }
    const std::string beyond = "layer_types." + std::to_string(count);
    if (has(beyond)) fail_value(beyond, std::to_string(count) + " layers", lookup_(beyond));
    return sliding;
  }

  std::vector<bool> periodic(std::int64_t count) const {
    std::int64_t period = family_.layers.full_every;
    for (const char* key : {"sliding_window_pattern", "_sliding_window_pattern"}) {
      if (period != 0 && has(key)) {
        period = size(key);
        break;
      }
    }
    std::vector<bool> sliding;
    for (std::int64_t layer = 0; layer < count; ++layer) {
      sliding.push_back(period != 0 && (layer + 1) % period != 0);
    }
    return sliding;
  }

  const Family& family_;
  const ConfigLookup& lookup_;
};

/// Sizes of heads and number of key heads for all layers.
void read_heads(const Reader& reader, const Family& family, std::vector<LayerShape>& layers) {
  const std::int64_t heads = reader.size("num_attention_heads");
  const std::int64_t head_dim =
      reader.find_size("head_dim").value_or(std::max<std::int64_t>(1, reader.size("hidden_size") / heads));
  const std::int64_t key_heads = reader.find_size("num_key_value_heads").value_or(heads);
  const bool by_layer = reader.has("per_layer_config");
  const bool k_eq_v = reader.flag("attention_k_eq_v");
  const std::int64_t full_head_dim =
      reader.find_size("global_head_dim")
          .value_or(family.layers.full_head_dim == 0 ? head_dim : family.layers.full_head_dim);
  // transformers reads the number for full layers only in models whose values are their keys
  const std::int64_t full_key_heads =
      k_eq_v ? reader.find_size("num_global_key_value_heads").value_or(key_heads) : key_heads;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    LayerShape& layer = layers[i];
    const auto number = static_cast<std::int64_t>(i);
    const bool full = !layer.sliding && !by_layer;
    layer.head_dim = reader.override_of(number, "head_dim").value_or(full ? full_head_dim : head_dim);
    layer.key_heads =
        reader.override_of(number, "num_key_value_heads").value_or(full ? full_key_heads : key_heads);
    layer.values_are_keys = k_eq_v && !layer.sliding;
    if (heads % layer.key_heads != 0) {
      fail_value("num_key_value_heads", "a divisor of num_attention_heads " + std::to_string(heads),
                 static_cast<double>(layer.key_heads));
    }
  }
}

/// Which layer's keys each layer uses: the last one of its kind that has its own.
void read_sharing(const Reader& reader, std::vector<LayerShape>& layers) {
  const auto count = static_cast<std::int64_t>(layers.size());
  const std::int64_t shared = reader.find_size("num_kv_shared_layers", 0.0).value_or(0);
  const std::int64_t first = count - shared;
  for (std::int64_t layer = 0; layer < count; ++layer) {
    LayerShape& shape = layers[static_cast<std::size_t>(layer)];
    shape.key_source = std::min(layer, first - 1);
    const auto other = [&] {
      return layers[static_cast<std::size_t>(shape.key_source)].sliding != shape.sliding;
    };
    while (layer >= first && shape.key_source >= 0 && other()) --shape.key_source;
    if (shape.key_source < 0) {
      fail_value("num_kv_shared_layers", "an unshared layer of each kind before the shared ones",
                 static_cast<double>(shared));
    }
  }
}

}  // namespace

ConfigLookup decoder_lookup(const Family& family, ConfigLookup lookup) {
  const bool nested = is_there(lookup("text_config.model_type"));
  return [&family, nested, lookup = std::move(lookup)](std::string_view path) -> ConfigValue {
    ConfigValue value = nested ? lookup("text_config." + std::string(path)) : lookup(path);
    if (is_there(value)) return value;
    const auto fallback = std::find_if(family.defaults.begin(), family.defaults.end(),
                                       [path](const auto& field) { return field.first == path; });
    return fallback == family.defaults.end() ? value : fallback->second;
  };
}

ModelShape read_shape(const Family& family, const ConfigLookup& lookup) {
  const Reader reader(family, lookup);
  ModelShape shape;
  shape.layers.resize(static_cast<std::size_t>(reader.layers()));
  const std::vector<bool> sliding = reader.windows(static_cast<std::int64_t>(shape.layers.size()));
  for (std::size_t i = 0; i < sliding.size(); ++i) shape.layers[i].sliding = sliding[i];
  read_heads(reader, family, shape.layers);
  read_sharing(reader, shape.layers);
  const std::int64_t feed_forward = reader.size("intermediate_size");
  const bool double_wide = reader.flag("use_double_wide_mlp");
  for (std::size_t i = 0; i < shape.layers.size(); ++i) {
    const bool wide = double_wide && !shape.owns_keys(static_cast<std::int64_t>(i));
    shape.layers[i].feed_forward = wide ? 2 * feed_forward : feed_forward;
  }
  if (std::find(sliding.begin(), sliding.end(), true) != sliding.end()) {
    shape.sliding_window = reader.size("sliding_window");
  }
  shape.layer_inputs = reader.find_size("hidden_size_per_layer_input", 0.0).value_or(0);
  if (reader.flag("enable_moe_block")) {
    shape.experts = reader.size("num_experts");
    shape.experts_per_token = reader.size("top_k_experts");
    shape.expert_feed_forward = reader.size("moe_intermediate_size");
  }
  return shape;
}

std::int64_t full_every(const ModelShape& shape) {
  const auto is_full = [](const LayerShape& layer) { return !layer.sliding; };
  const auto first = std::find_if(shape.layers.begin(), shape.layers.end(), is_full);
  const std::int64_t period = first - shape.layers.begin() + 1;
  for (std::size_t i = 0; i < shape.layers.size(); ++i) {
    const bool full = (static_cast<std::int64_t>(i) + 1) % period == 0;
    if (full == shape.layers[i].sliding) return 0;
  }
  return period;
}

std::int64_t full_head_dim(const ModelShape& shape) {
  const auto full = std::find_if(shape.layers.begin(), shape.layers.end(),
                                 [](const LayerShape& layer) { return !layer.sliding; });
  return full == shape.layers.end() ? shape.layers.front().head_dim : full->head_dim;
}

std::int64_t attention_scalar(const ModelShape& shape, std::int64_t hidden_size, std::int64_t heads) {
  constexpr std::size_t kLayersOf27B = 62;
  return shape.layers.size() == kLayersOf27B ? hidden_size / heads : full_head_dim(shape);
}

Ropes read_ropes(const Family& family, const ConfigLookup& lookup) {
  if (!family.sliding_rope) {
    const Rope rope = read_rope(lookup);
    return {rope, rope};
  }
  return {read_rope(lookup, RopeLayers::kFull, family.rope),
          read_rope(lookup, RopeLayers::kSliding, *family.sliding_rope)};
}

Presence presence(const TensorRule& rule, const ModelShape& shape, std::optional<std::int64_t> layer) {
  if (layer && (*layer < 0 || *layer >= static_cast<std::int64_t>(shape.layers.size())))
    return Presence::kAbsent;
  const bool owns = !layer || shape.owns_keys(*layer);
  const bool values = owns && !(layer && shape.layers[static_cast<std::size_t>(*layer)].values_are_keys);
  switch (rule.where) {
    case Where::kEverywhere:
      break;
    case Where::kOwnKeys:
      return owns ? Presence::kRequired : Presence::kDead;
    case Where::kOwnValues:
      return values ? Presence::kRequired : owns ? Presence::kAbsent : Presence::kDead;
    case Where::kExperts:
      return shape.experts > 0 ? Presence::kRequired : Presence::kAbsent;
    case Where::kLayerInputs:
      return shape.layer_inputs > 0 ? Presence::kRequired : Presence::kAbsent;
  }
  return rule.optional ? Presence::kOptional : Presence::kRequired;
}

}  // namespace qat::arch
