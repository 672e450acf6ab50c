#pragma once

// libqat's own decoder: one configurable module for the families in `arch`, built from qat::nn layers, with
// Hugging Face's parameter names. Legend: B batch, T tokens, V vocabulary, h hidden, H heads, K key-value
// heads, D head dimension.

#include <torch/nn/module.h>

#include <memory>
#include <vector>

#include "qat/models/config.hpp"
#include "qat/models/kv_cache.hpp"
#include "qat/nn/kv_slot.hpp"
#include "qat/quantizer/head.hpp"
#include "qat/quantizer/stage.hpp"

namespace qat::models {

/// A causal language model of one of the families.
class Decoder : public torch::nn::Module, public nn::HasKvSlots {
 public:
  /// A decoder with random weights. Parameters are float32 and named as in Hugging Face's state_dict
  /// ("model.layers.0.self_attn.q_proj.weight", ...); "lm_head.weight" exists only when untied.
  explicit Decoder(const DecoderConfig& config);
  ~Decoder() override;

  /// tokens: int64[B, T] -> logits [B, T, V] in the compute dtype: autocast's when autocast is on, else the
  /// dtype of the weights. ArgumentError for another shape or dtype and for ids outside the vocabulary.
  at::Tensor forward(const at::Tensor& tokens);

  /// The same for tokens that follow those in `cache` (made of the same configuration), which then holds
  /// these too: a prompt first, then one token at a time. What one full forward pass gives at their
  /// positions, within rounding. Without gradients. ArgumentError also for another number of sequences than
  /// before; the cache then is as it was.
  at::Tensor forward(const at::Tensor& tokens, KvCache& cache);

  /// The two halves of `forward`, for losses that take the logits in pieces.
  /// tokens: int64[B, T] -> [B, T, h] in the compute dtype, after the final norm.
  at::Tensor hidden(const at::Tensor& tokens);
  /// hidden: [..., h] -> logits [..., V].
  at::Tensor head(const at::Tensor& hidden);
  /// The layer that `head` calls: the untied head, or the embedding's table with its quantizer.
  Head output_head() const;

  /// `hidden` in stages, each up to where the input of some linear layers is ready: of the projection of all
  /// layers' own inputs; of a layer's q, k and v, of o, of gate and up, of down, of the experts' gate and up,
  /// of their down, of the gate and the projection of its own input; then the head's input. Calling them one
  /// after the other computes what `hidden` does, bit for bit. They stay valid as long as any of them lives.
  /// In no stage: tables (they have no input) and the router (its choice is not continuous in it).
  std::vector<Stage> stages() const;

  /// Keys behind their norm and rotation, and values behind theirs: what a cache holds.
  std::vector<nn::KvSlot> kv_slots() override;

  /// A second decoder with a copy of the weights, without gradients and quantizers: a teacher. Matrices are
  /// stored in `dtype` (no cast per forward pass, half the memory in bfloat16), gains and routers in float32.
  std::shared_ptr<Decoder> frozen_copy(at::ScalarType dtype);

  const DecoderConfig& config() const noexcept { return config_; }

 private:
  at::Tensor hidden_of(const at::Tensor& tokens, KvCache* cache);

  DecoderConfig config_;
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace qat::models
