#pragma once

// What a policy does to each tensor of a model, in numbers.

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "qat/core/scheme.hpp"

namespace qat {

/// One line of the report.
struct TensorReport {
  std::string name;
  SlotKind kind;
  std::vector<int64_t> shape;
  std::string grid;                     ///< for an unquantized tensor its own type: "f32", "bf16", ...
  double bits_per_weight;               ///< scales included
  int64_t bytes;                        ///< packed codes and stored scales, without the container's padding
  double relative_error;                ///< RMS(w_hat - w) / RMS(w); 0 for tensors kept as they are
  std::string input = {}, output = {};  ///< formats of the activations of its product, or ""
};

/// The line of one tensor, quantized with the scales that `scale` gives, or with `scales` when that is
/// kLearned. `latent`: float32[R, ...], or anything when scheme is "f32" (kept as it is).
TensorReport report_tensor(const std::string& name, SlotKind kind, const at::Tensor& latent,
                           const Scheme& scheme, ScaleRule scale = ScaleRule::kReference,
                           const at::Tensor& scales = {});

/// The report as an aligned text table that ends with a line of totals.
std::string to_string(const std::vector<TensorReport>& report);

}  // namespace qat
