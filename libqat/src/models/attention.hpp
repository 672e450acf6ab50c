#pragma once

#include <torch/nn/module.h>

#include <memory>

#include "forward_pass.hpp"
#include "qat/models/config.hpp"
#include "qat/nn/linear.hpp"
#include "rms_norm.hpp"

namespace qat::models {

/// Causal self-attention with grouped key-value heads: head j of H reads key-value head j * K / H.
class AttentionImpl : public torch::nn::Module {
 public:
  AttentionImpl(const DecoderConfig& config, int64_t layer);

  /// x: [B, T, h] in the compute dtype -> the heads' values side by side, [B, T, H * D].
  at::Tensor mixed(const at::Tensor& x, ForwardPass& pass);
  /// mixed: [B, T, H * D] -> [B, T, h].
  at::Tensor output(const at::Tensor& mixed) { return o_proj_(mixed); }

  /// What rounds keys and values before later tokens and layers read them; null: nothing does. Of a layer
  /// that makes its own.
  std::shared_ptr<ActivationQuantizer> key_rounding, value_rounding;

 private:
  /// [B, T, heads * D] -> [B, T, heads, D], normed if the model does that.
  at::Tensor heads(const at::Tensor& flat, RmsNorm& norm) const;
  KeysValues make_keys_values(const at::Tensor& x, const RopeTable& rope);

  int64_t layer_;
  LayerConfig config_;
  double scale_;
  double eps_;
  bool v_norm_;
  nn::Linear q_proj_, o_proj_;
  nn::Linear k_proj_{nullptr}, v_proj_{nullptr};  ///< empty where there are none
  RmsNorm q_norm_{nullptr}, k_norm_{nullptr};
};
TORCH_MODULE(Attention);

}  // namespace qat::models
