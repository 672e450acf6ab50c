#pragma once

// libqat's own decoder: one configurable module for the families in `arch`, built from qat::nn layers, with
// Hugging Face's parameter names. Legend: B batch, T tokens, V vocabulary, h hidden, H heads, K key-value
// heads, D head dimension.

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <string>

namespace qat::models {

/// The fields of a Hugging Face config.json that the decoder reads.
struct DecoderConfig {
  std::string model_type = "llama";
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  int64_t max_position_embeddings = 2048;
  bool tie_word_embeddings = false;
};

/// Reads both spellings (rope_theta, rope_parameters). ArgumentError naming the key; UnsupportedError for
/// rope scaling, biases, activations or model types that the decoder does not implement.
DecoderConfig config_from_json(const std::string& json);

class Decoder : public torch::nn::Module {
 public:
  explicit Decoder(const DecoderConfig& config);
  ~Decoder() override;

  /// tokens: int64[B, T] -> logits [B, T, V]. Runs in the autocast dtype when autocast is on, else in
  /// float32. ArgumentError for ids outside the vocabulary.
  at::Tensor forward(const at::Tensor& tokens);

  const DecoderConfig& config() const noexcept { return config_; }

 private:
  DecoderConfig config_;
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

/// A model as it was found on disk.
struct LoadedModel {
  std::shared_ptr<Decoder> decoder;  ///< float32 latents
  std::string config;                ///< JSON in Hugging Face's spelling (made from the metadata for a GGUF)
  std::string tokenizer;  ///< path to take the tokenizer from: the GGUF itself, or the HF directory
};

/// `path`: an HF directory (config.json and safetensors) or a GGUF file. A missing, extra or misshapen tensor
/// is a FileError naming it; all missing ones are listed at once.
LoadedModel load_model(const std::string& path);

/// The decoder with the numbers of a checkpoint (dequantized), for scoring what ships.
LoadedModel load_checkpoint(const std::string& path);

}  // namespace qat::models
