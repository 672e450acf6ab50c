#pragma once

// The last layer of a language model as plain data, so that a loss can multiply with it piece by piece.

#include <ATen/core/Tensor.h>

#include <memory>

#include "qat/quantizer/quantizer.hpp"

namespace qat {

/// logits = hidden @ W_hat^T + bias, softly capped: c * tanh(logits / c).
struct Head {
  at::Tensor weight;                          ///< [V, h], the latent
  at::Tensor bias = {};                       ///< [V], or undefined
  std::shared_ptr<Quantizer> quantizer = {};  ///< null: the weight as it is
  double softcap = 0.0;                       ///< c; 0: no cap

  /// hidden: float[..., h] -> logits [..., V] in its dtype, differentiable.
  at::Tensor logits(const at::Tensor& hidden) const;
  /// W_hat rounded once to `dtype`, without a gradient.
  at::Tensor shipped_weight(at::ScalarType dtype) const;
};

}  // namespace qat
