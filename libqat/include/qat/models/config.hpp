#pragma once

// What the decoder needs to know of a model, read from a Hugging Face config.json.

#include <cstdint>
#include <string>

#include "qat/arch/rope.hpp"

namespace qat::models {

/// The fields of config.json that the decoder reads, with Hugging Face's names and defaults.
struct DecoderConfig {
  std::string model_type = "llama";
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;  ///< divides num_attention_heads
  int64_t head_dim = 0;             ///< even; num_attention_heads * head_dim need not equal hidden_size
  double rms_norm_eps = 1e-6;
  arch::Rope rope;
  int64_t max_position_embeddings = 2048;
  bool tie_word_embeddings = false;
  bool attention_bias = false;  ///< on q_proj, k_proj and v_proj
  bool output_bias = false;     ///< on o_proj
  bool mlp_bias = false;        ///< on gate_proj, up_proj and down_proj
};

/// Reads `json`, the text of a config.json. Sizes, layers, heads and model_type are required; head_dim
/// defaults to hidden_size / num_attention_heads and num_key_value_heads to num_attention_heads. The rotary
/// embedding may be spelled `rope_parameters`, or `rope_theta` and `rope_scaling` (see arch/rope.hpp).
/// ArgumentError naming the key for a missing key, a wrong type or an impossible value; UnsupportedError
/// naming the key for rope types, activations, attention windows, model types or quantized weights that the
/// decoder does not implement.
DecoderConfig config_from_json(const std::string& json);

/// Throws ArgumentError naming the first field that is out of range.
void validate(const DecoderConfig& config);

}  // namespace qat::models
