#pragma once

#include <torch/nn/module.h>

#include "forward_pass.hpp"
#include "qat/models/config.hpp"
#include "qat/nn/experts.hpp"
#include "qat/nn/linear.hpp"
#include "rms_norm.hpp"

namespace qat::models {

/// Chooses k of E experts for each token: a softmax over all, of which the largest k are kept and made to sum
/// to 1. Runs in float32 whatever the compute dtype: a choice is not continuous.
class RouterImpl : public torch::nn::Module {
 public:
  struct Choice {
    at::Tensor experts;  ///< int64[N, k]
    at::Tensor weights;  ///< float32[N, k], differentiable
  };

  explicit RouterImpl(const DecoderConfig& config);
  /// x: float32[N, h], the residual stream.
  Choice forward(const at::Tensor& x);

 private:
  int64_t per_token_;
  double eps_;
  nn::Linear proj_;
  at::Tensor scale_, per_expert_scale_;  ///< float32[h], float32[E]
};
TORCH_MODULE(Router);

/// N tokens in front of the experts: each stands here once for each of its k experts, sorted by expert.
struct RoutedTokens {
  at::Tensor rows;     ///< [N * k, h] in the compute dtype
  at::Tensor counts;   ///< int64[E] on the CPU: how many of the rows each expert gets
  at::Tensor places;   ///< int64[N * k]: where in `rows` a token's experts stand, token by token
  at::Tensor weights;  ///< float32[N, k]
};

/// The experts beside a dense feed-forward layer, with their norms: a token's output is the weighted sum of
/// those that the router chooses. Only experts that some token of the batch hits are quantized and
/// multiplied.
class ExpertBranch {
 public:
  /// Registers its parts in `block`, under Hugging Face's names.
  ExpertBranch(const DecoderConfig& config, torch::nn::Module& block);

  /// x: the residual stream in front of the feed-forward layer, [B, T, h].
  RoutedTokens route(const at::Tensor& x, at::ScalarType compute);
  /// f(gate) * up of each row by its expert, [N * k, f].
  at::Tensor gated(const RoutedTokens& tokens) const;
  /// Those products through their experts' down, summed for each token; dense: what the dense layer gave, [B,
  /// T, h]
  /// -> the sum of both branches, each behind its norm.
  at::Tensor join(const RoutedTokens& tokens, const at::Tensor& gated, const at::Tensor& dense);

 private:
  Activation activation_;
  Router router_;
  nn::Experts experts_;
  RmsNorm input_norm_, output_norm_, dense_output_norm_;
};

}  // namespace qat::models
