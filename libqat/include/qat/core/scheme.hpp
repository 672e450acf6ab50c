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

/// Where a dynamic scale comes from. Whatever the choice, the result is a legal scale of the same format.
enum class ScaleRule {
  /// The consumer's own quantizer, bit for bit.
  kReference,
  /// A search for the scale with the least squared error of the weights.
  kSearch,
};

/// "reference" or "search".
std::string_view to_string(ScaleRule rule) noexcept;
/// The reverse of `to_string`. Throws ArgumentError that lists the legal names.
ScaleRule scale_rule(std::string_view name);

/// Training-only settings of one tensor. JSON and Python: `{"kind": "ste", "scale": "reference"}`.
struct Estimator {
  EstimatorKind kind = EstimatorKind::kSte;
  ScaleRule scale = ScaleRule::kReference;

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
