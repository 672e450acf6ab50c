#pragma once

// A small configuration of every shape of model, as tests of the decoder use them.

#include <string>
#include <utility>
#include <vector>

#include "qat/models/config.hpp"

namespace qat::models {

inline DecoderConfig llama(bool tied = true) {
  DecoderConfig config;
  config.vocab_size = 50;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.num_hidden_layers = 3;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.tie_word_embeddings = tied;
  return config;
}

/// `count` layers, each third one without the window of 5.
inline DecoderConfig windows(int64_t count) {
  DecoderConfig config = llama();
  config.num_hidden_layers = count;
  for (int64_t i = 0; i < count; ++i) {
    LayerConfig layer{2, 8, 48, 5, i, true, {}};
    if (i % 3 == 2) layer = {2, 8, 48, 0, i, true, {.theta = 1e6}};
    config.layers.push_back(layer);
  }
  config.activation = Activation::kGeluTanh;
  config.qk_norm = config.branch_norms = true;
  config.embedding_scale = 5.65;
  return config;
}

inline DecoderConfig gemma3() {
  DecoderConfig config = windows(4);
  config.norm_offset = 1.0;
  config.attention_scale = 0.3;
  return config;
}

inline DecoderConfig gemma4(int64_t count) {
  DecoderConfig config = windows(count);
  config.attention_scale = 1.0;
  config.v_norm = config.layer_scalar = true;
  config.final_logit_softcapping = 3.0;
  for (LayerConfig& layer : config.layers) {
    if (layer.window == 0) layer.head_dim = 16;
  }
  return config;
}

/// Per-layer inputs, shared keys, wide layers.
inline DecoderConfig gemma4_small() {
  DecoderConfig config = gemma4(6);
  config.per_layer_input = {8, 50};
  for (size_t i = 4; i < 6; ++i) {
    config.layers[i].kv_source = config.layers[i].window == 0 ? 2 : 3;
    config.layers[i].intermediate_size = 96;
  }
  return config;
}

/// Values are keys in layers without a window; experts.
inline DecoderConfig gemma4_experts() {
  DecoderConfig config = gemma4(3);
  config.experts = {5, 2, 16};
  config.layers[2].has_value = false;
  config.layers[2].num_key_value_heads = 1;
  return config;
}

inline std::vector<std::pair<std::string, DecoderConfig>> shapes() {
  return {{"llama", llama()},
          {"llama, untied", llama(false)},
          {"gemma3", gemma3()},
          {"gemma4, small", gemma4_small()},
          {"gemma4, experts", gemma4_experts()}};
}

}  // namespace qat::models
