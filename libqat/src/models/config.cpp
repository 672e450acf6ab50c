#include "qat/models/config.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "qat/core/error.hpp"

namespace qat::models {
namespace {

/// Sizes and models beyond these are a broken file. They also keep products of sizes within int64.
constexpr int64_t kMaxSize = int64_t{1} << 31;
constexpr double kMaxWeights = 1e15;

[[noreturn]] void fail(const std::string& key, const std::string& expected, const std::string& got) {
  throw ArgumentError("config: \"" + key + "\": expected " + expected + ", got " + got);
}

void check_size(const char* key, int64_t value, int64_t least = 1, int64_t most = kMaxSize) {
  if (value >= least && value <= most) return;
  fail(key, std::to_string(least) + ".." + std::to_string(most), std::to_string(value));
}

void check_number(const char* key, double value) {
  if (!std::isfinite(value) || value < 0) fail(key, "a number >= 0", std::to_string(value));
}

void check_layer(const DecoderConfig& config, int64_t i) {
  const LayerConfig layer = config.layer(i);
  check_size("num_key_value_heads", layer.num_key_value_heads);
  check_size("head_dim", layer.head_dim);
  check_size("intermediate_size", layer.intermediate_size);
  check_size("sliding_window", layer.window, 0);
  if (config.num_attention_heads % layer.num_key_value_heads != 0) {
    fail("num_key_value_heads",
         "a divisor of num_attention_heads " + std::to_string(config.num_attention_heads),
         std::to_string(layer.num_key_value_heads));
  }
  if (layer.head_dim % 2 != 0) fail("head_dim", "an even number", std::to_string(layer.head_dim));
  check_size("num_kv_shared_layers", layer.kv_source, 0, i);
  const LayerConfig source = config.layer(layer.kv_source);
  if (source.kv_source != layer.kv_source || source.head_dim != layer.head_dim ||
      source.num_key_value_heads != layer.num_key_value_heads) {
    fail("num_kv_shared_layers", "layers that share keys of their own shape", "layer " + std::to_string(i));
  }
  try {
    arch::validate(layer.rope);
  } catch (const ArgumentError& error) {
    throw ArgumentError(std::string("config: ") + error.what());
  }
}

void check_experts(const ExpertsConfig& experts) {
  if (experts.count == 0) return;
  check_size("num_experts", experts.count);
  check_size("top_k_experts", experts.per_token, 1, experts.count);
  check_size("moe_intermediate_size", experts.intermediate_size);
}

double attention_weights(const DecoderConfig& config, int64_t i) {
  const LayerConfig layer = config.layer(i);
  const auto hidden = static_cast<double>(config.hidden_size), dim = static_cast<double>(layer.head_dim);
  const double heads = static_cast<double>(config.num_attention_heads) * dim;
  const bool owns = layer.kv_source == i;
  const double keys = owns ? static_cast<double>(layer.num_key_value_heads) * dim : 0.0;
  const double values = layer.has_value ? keys : 0.0;
  double sum = hidden * (2.0 * heads + keys + values);
  if (config.attention_bias) sum += heads + keys + values;
  if (config.output_bias) sum += hidden;
  if (config.qk_norm) sum += owns ? 2.0 * dim : dim;
  return sum;
}

double expert_weights(const DecoderConfig& config) {
  if (config.experts.count == 0) return 0.0;
  const auto hidden = static_cast<double>(config.hidden_size);
  const auto count = static_cast<double>(config.experts.count);
  return count * (3.0 * hidden * static_cast<double>(config.experts.intermediate_size) + hidden + 1.0) +
         4.0 * hidden;
}

}  // namespace

LayerConfig DecoderConfig::layer(int64_t i) const {
  if (!layers.empty()) return layers.at(static_cast<size_t>(i));
  return {num_key_value_heads, head_dim, intermediate_size, 0, i, true, rope};
}

void validate(const DecoderConfig& config) {
  check_size("vocab_size", config.vocab_size);
  check_size("hidden_size", config.hidden_size);
  check_size("num_hidden_layers", config.num_hidden_layers);
  check_size("num_attention_heads", config.num_attention_heads);
  check_size("max_position_embeddings", config.max_position_embeddings);
  const auto listed = static_cast<int64_t>(config.layers.size());
  if (listed != 0) check_size("num_hidden_layers", config.num_hidden_layers, listed, listed);
  for (int64_t i = 0; i < std::max<int64_t>(listed, 1); ++i) check_layer(config, i);
  check_number("rms_norm_eps", config.rms_norm_eps);
  check_number("query_pre_attn_scalar", config.attention_scale);
  check_number("final_logit_softcapping", config.final_logit_softcapping);
  check_experts(config.experts);
  check_size("hidden_size_per_layer_input", config.per_layer_input.size, 0);
  if (config.per_layer_input.size > 0) {
    check_size("vocab_size_per_layer_input", config.per_layer_input.vocab_size);
  }
  if (const double weights = weight_count(config); weights > kMaxWeights) {
    fail("num_hidden_layers", "sizes of at most 1e15 weights together", std::to_string(weights));
  }
}

double weight_count(const DecoderConfig& config) {
  const auto hidden = static_cast<double>(config.hidden_size);
  const auto layers = static_cast<double>(config.num_hidden_layers);
  const double norms = config.branch_norms ? 4.0 : 2.0;
  const auto input = static_cast<double>(config.per_layer_input.size);
  const auto layer_weights = [&](int64_t i) {
    const auto width = static_cast<double>(config.layer(i).intermediate_size);
    double sum =
        attention_weights(config, i) + 3.0 * hidden * width + norms * hidden + expert_weights(config);
    if (config.mlp_bias) sum += 2.0 * width + hidden;
    if (input > 0) sum += 2.0 * hidden * input + hidden;
    return sum;
  };
  double sum = config.layers.empty() ? layers * layer_weights(0) : 0.0;
  for (size_t i = 0; i < config.layers.size(); ++i) sum += layer_weights(static_cast<int64_t>(i));
  const auto vocabulary = static_cast<double>(config.vocab_size);
  sum += hidden * vocabulary * (config.tie_word_embeddings ? 1.0 : 2.0) + hidden;
  if (input == 0) return sum;
  const auto rows = static_cast<double>(config.per_layer_input.vocab_size);
  return sum + layers * input * (rows + hidden) + input;
}

}  // namespace qat::models
