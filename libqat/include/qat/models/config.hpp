#pragma once

// What the decoder needs to know of a model: plain data, read from a Hugging Face config.json. No part of
// the decoder asks for a family by name; what families differ in are the fields below.

#include <cstdint>
#include <string>
#include <vector>

#include "qat/arch/rope.hpp"

namespace qat::models {

/// f of the gated layers, f(gate(x)) * up(x).
enum class Activation {
  kSilu,
  kGeluTanh,  ///< g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 g^3)))
};

/// The attention and the feed-forward layer of one block.
struct LayerConfig {
  int64_t num_key_value_heads = 0;  ///< divides num_attention_heads
  int64_t head_dim = 0;             ///< even
  int64_t intermediate_size = 0;
  int64_t window = 0;     ///< a token attends to this many, itself included; 0: to all before it
  int64_t kv_source = 0;  ///< the layer whose keys and values it reads: itself, or an earlier one
  bool has_value = true;  ///< without a v_proj, values are what k_proj gives
  arch::Rope rope;

  bool operator==(const LayerConfig&) const = default;
};

/// Per-layer embeddings (Gemma 3n and 4): each layer adds a gated vector of its own, looked up by token.
struct PerLayerInputConfig {
  int64_t size = 0;  ///< p; 0: the model has none
  int64_t vocab_size = 0;

  bool operator==(const PerLayerInputConfig&) const = default;
};

/// A mixture of experts beside the dense feed-forward layer of every block.
struct ExpertsConfig {
  int64_t count = 0;  ///< E; 0: the model has none
  int64_t per_token = 0;
  int64_t intermediate_size = 0;

  bool operator==(const ExpertsConfig&) const = default;
};

/// A decoder. Fields that config.json has under the same name have its meaning.
struct DecoderConfig {
  std::string model_type = "llama";  ///< as found in the file; the decoder does not read it
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  // Of every layer when `layers` is empty.
  int64_t intermediate_size = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;  ///< num_attention_heads * head_dim need not equal hidden_size
  arch::Rope rope;
  /// One for each layer, or empty: all attend to everything before them, with the sizes above.
  std::vector<LayerConfig> layers = {};
  double rms_norm_eps = 1e-6;
  int64_t max_position_embeddings = 2048;
  bool tie_word_embeddings = false;
  bool attention_bias = false;  ///< on q_proj, k_proj and v_proj
  bool output_bias = false;     ///< on o_proj
  bool mlp_bias = false;        ///< on gate_proj, up_proj and down_proj
  Activation activation = Activation::kSilu;
  double norm_offset = 0.0;      ///< norms multiply with norm_offset + weight
  bool qk_norm = false;          ///< queries and keys pass a norm per head, in front of the rotary embedding
  bool v_norm = false;           ///< values pass one without a weight
  bool branch_norms = false;     ///< attention and feed-forward layer have a norm behind them too
  double attention_scale = 0.0;  ///< of q^T k; 0: 1 / sqrt(head_dim)
  double embedding_scale =
      1.0;  ///< of token embeddings; rounded to the dtype of their table, as transformers
  double final_logit_softcapping = 0.0;  ///< logits become c * tanh(logits / c); 0: they stay
  bool layer_scalar = false;             ///< what a block leaves is multiplied with its buffer `layer_scalar`
  PerLayerInputConfig per_layer_input;
  ExpertsConfig experts;

  /// What `layers` says of layer i, or the sizes above.
  LayerConfig layer(int64_t i) const;
};

/// Reads `json`, the text of a config.json: published files (of multimodal models the "text_config") and what
/// transformers 5 writes. Keys, spellings and what a model's class assumes for missing keys: see
/// arch/layers.hpp and arch/rope.hpp. Sizes, layers, heads and model_type are required unless the class has a
/// default; head_dim defaults to hidden_size / num_attention_heads and num_key_value_heads to
/// num_attention_heads. ArgumentError naming the key for a missing key, a wrong type or an impossible value;
/// UnsupportedError naming the key for rope types, activations, attention masks, model types or quantized
/// weights that the decoder does not implement.
DecoderConfig config_from_json(const std::string& json);

/// Throws ArgumentError naming the first field that is out of range.
void validate(const DecoderConfig& config);

/// The number of weights of the decoder, without allocating any; as double, since the sizes of a broken
/// configuration overflow.
double weight_count(const DecoderConfig& config);

}  // namespace qat::models
