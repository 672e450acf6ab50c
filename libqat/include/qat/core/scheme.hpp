#pragma once

// What ships and what only trains are two types. A Scheme is written into the checkpoint and the exported
// file; an Estimator decides how gradients pass through rounding and never leaves training.

#include <string>
#include <string_view>

namespace qat {

/// How one tensor is stored in the deployed file.
struct Scheme {
  /// Name of the weight's grid (`grid::names()`), in the consumer's own spelling: "q4_0", "int4_channel", ...
  std::string weight = "f32";

  bool operator==(const Scheme&) const = default;
};

/// How the gradient of the rounding is estimated.
enum class EstimatorKind {
  /// Identity straight-through: dL/dw := dL/dw_hat. (Bengio et al. 2013, arXiv:1308.3432)
  kSte,
  /// Straight-through inside the code range, zero outside: dL/dw := dL/dw_hat * 1[n <= w/s + z <= p].
  kClippedSte,
};

/// Training-only settings of one tensor. JSON and Python: `{"kind": "ste"}`.
struct Estimator {
  EstimatorKind kind = EstimatorKind::kSte;

  bool operator==(const Estimator&) const = default;
};

/// "ste" or "clipped_ste".
std::string_view to_string(EstimatorKind kind) noexcept;

/// The reverse of `to_string`. Throws ArgumentError that lists the legal names.
EstimatorKind estimator_kind(std::string_view name);

/// What kind of layer a weight belongs to, as policies see it.
enum class SlotKind { kLinear, kEmbedding, kConv, kOther };

/// "linear", "embedding", "conv" or "other".
std::string_view to_string(SlotKind kind) noexcept;
/// The reverse of `to_string`. Throws ArgumentError that lists the legal names.
SlotKind slot_kind(std::string_view name);

}  // namespace qat
