#pragma once

#include <torch/nn/module.h>

#include <optional>

#include "attention.hpp"
#include "expert_branch.hpp"
#include "forward_pass.hpp"
#include "mlp.hpp"
#include "rms_norm.hpp"

namespace qat::models {

/// One layer of the decoder: attention, then the feed-forward layer (with experts beside it), then the
/// layer's own input, each added to the residual stream if the model has it. Cut into the steps between which
/// inputs of linear layers are ready (see Decoder::stages). x: the residual stream, float32[B, T, h]; the
/// branches run in the compute dtype.
class BlockImpl : public torch::nn::Module {
 public:
  BlockImpl(const DecoderConfig& config, int64_t layer);
  /// x -> x behind the layer.
  at::Tensor forward(at::Tensor x, ForwardPass& pass);

  /// x -> what q, k and v are made of, [B, T, h].
  at::Tensor attention_input(const at::Tensor& x, const ForwardPass& pass);
  /// Its attention's result, [B, T, H * D], through o and added to x.
  at::Tensor add_attention(const at::Tensor& x, const at::Tensor& mixed);
  /// x -> what gate and up are made of, [B, T, h].
  at::Tensor feed_forward_input(const at::Tensor& x, const ForwardPass& pass);
  /// The products of gate and up, [B, T, I], through down and added to x, with the experts if there are any.
  at::Tensor add_feed_forward(const at::Tensor& x, const at::Tensor& gated, const ForwardPass& pass);
  /// What the feed-forward layer gave, with the experts in it, added to x.
  at::Tensor add_branch(const at::Tensor& x, const at::Tensor& branch);
  /// Empty in a model without.
  std::optional<ExpertBranch>& experts() { return experts_; }
  /// Of a model with inputs per layer: x -> f(gate(x)) * the layer's own input, [B, T, p].
  at::Tensor gated_layer_input(const at::Tensor& x, const ForwardPass& pass);
  /// That product, through its projection and added to x.
  at::Tensor add_layer_input(const at::Tensor& x, const at::Tensor& gated);
  /// The last step: what the layer leaves.
  at::Tensor leave(const at::Tensor& x);

  Attention self_attn;
  Mlp mlp;

 private:
  int64_t layer_;
  Activation activation_;
  RmsNorm input_norm_, feed_forward_norm_;
  RmsNorm attention_output_norm_{nullptr}, feed_forward_output_norm_{nullptr};  ///< empty: no norm there
  std::optional<ExpertBranch> experts_;
  // Of a model with inputs per layer.
  nn::Linear layer_input_gate_{nullptr}, layer_input_projection_{nullptr};
  RmsNorm layer_input_norm_{nullptr};
  at::Tensor layer_scalar_;  ///< float32[1], or undefined
};
TORCH_MODULE(Block);

}  // namespace qat::models
