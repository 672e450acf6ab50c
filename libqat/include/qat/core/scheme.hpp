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

/// How the gradient of the rounding is estimated. e = (w_hat - w) / step is a weight's rounding error in
/// steps; a weight is inside while its unrounded code lies in the code range.
enum class EstimatorKind {
  /// Identity straight-through: dL/dw := dL/dw_hat. (Bengio et al. 2013, arXiv:1308.3432)
  kSte,
  /// Straight-through inside, zero outside: dL/dw := dL/dw_hat * 1[n <= w/s + z <= p].
  kClippedSte,
  /// Straight-through where rounding errs little: 1[|w_hat - w| <= t], t = c_b * RMS(row of w) / (2^b - 1)
  /// with c_b the MSE-optimal range of a normal distribution at b bits. (QuEST, arXiv:2502.05003)
  kTrustMask,
  /// (1 - S) / (1 + S) inside, S = sqrt(2) pi a cos(pi e), a = 0.21; zero outside. (StableQAT,
  /// arXiv:2601.19320)
  kStableQat,
};

/// Where a scale comes from. Whatever the choice, the result is a legal scale of the same format.
enum class ScaleRule {
  /// The consumer's own quantizer, bit for bit, at each step; constant for the gradient.
  kReference,
  /// A search for the scale with the least squared error of the weights, at each step; constant for the
  /// gradient.
  kSearch,
  /// As kReference, and the gradient also flows through the rule into the weights that determine the scale.
  kDifferentiated,
  /// A parameter of its own, [R, G, P], that passes through the grid's `store` in the forward pass with a
  /// straight-through gradient; held still when it requires none. (LSQ, arXiv:1902.08153; LSQ+,
  /// arXiv:2004.09576, where the grid has an offset)
  kLearned,
  /// Learned, and tied to each other so that the levels are those of stretched elastic quantization: the
  /// parameters are float32[R, G, F], see grid/seq.hpp. Grids that hold such levels only. (ParetoQ,
  /// arXiv:2502.02631)
  kSeq,
};

/// "reference", "search", "differentiated", "learned" or "seq".
std::string_view to_string(ScaleRule rule) noexcept;
/// The reverse of `to_string`. Throws ArgumentError that lists the legal names.
ScaleRule scale_rule(std::string_view name);
/// Whether scales are parameters that train.
constexpr bool is_learned(ScaleRule rule) noexcept {
  return rule == ScaleRule::kLearned || rule == ScaleRule::kSeq;
}

/// What the gradient of a learned scale is multiplied with. p is the largest code, N a number of weights.
enum class ScaleGradient {
  kLsq,     ///< 1 / sqrt(N p), N the weights that share the scale (a block, a row)
  kTensor,  ///< 1 / sqrt(N p), N all weights of the tensor
  kPlain,   ///< 1
};

/// "lsq", "tensor" or "plain".
std::string_view to_string(ScaleGradient rule) noexcept;
/// The reverse of `to_string`. Throws ArgumentError that lists the legal names.
ScaleGradient scale_gradient(std::string_view name);

/// Training-only settings of one tensor. JSON and Python: `{"kind": "ste", "scale": "reference",
/// "scale_gradient": "lsq"}`. The kind "lsq" is short for clipped_ste with learned scales, the kind "seq" for
/// clipped_ste with the scales kSeq.
struct Estimator {
  EstimatorKind kind = EstimatorKind::kSte;
  ScaleRule scale = ScaleRule::kReference;
  ScaleGradient scale_gradient = ScaleGradient::kLsq;

  bool operator==(const Estimator&) const = default;
};

/// "ste", "clipped_ste", "trust_mask" or "stable_qat".
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
