#pragma once

// Activations as consumers round them: the names of the formats, and how a scale that is the same for all
// tokens is found. What the formats compute: qat/ops/activation.hpp.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace qat {

/// One scale per tensor, the same for all tokens.
inline constexpr std::string_view kInt8TensorStatic = "int8_tensor_static";
/// One scale per token, from its own values.
inline constexpr std::string_view kInt8Token = "int8_token";
/// llama.cpp's blocks of 32 along the last dimension.
inline constexpr std::string_view kQ8_0 = "q8_0";

/// The formats of activations.
std::vector<std::string_view> activation_formats();
/// Throws ArgumentError, listing all formats, when there is none of that name.
void check_activation_format(std::string_view format);

/// How the product with one weight rounds activations: formats, "" where it does not.
struct Activations {
  std::string input = {};   ///< of what goes in
  std::string output = {};  ///< of what comes out

  bool any() const noexcept { return !input.empty() || !output.empty(); }
  bool operator==(const Activations&) const = default;
};

/// Where the scales of int8_tensor_static come from, after calibration.
enum class ActivationRule {
  kObserved,  ///< they stay what calibration found
  kLearned,   ///< parameters that start there. (LSQ, arXiv:1902.08153)
};

/// "observed" or "learned".
std::string_view to_string(ActivationRule rule) noexcept;
/// The reverse of `to_string`. Throws ArgumentError that lists the legal names.
ActivationRule activation_rule(std::string_view name);

/// Training-only settings of all static activation scales of a model. JSON: {"rule": "observed",
/// "batches": 16}.
struct ActivationScales {
  ActivationRule rule = ActivationRule::kObserved;
  /// Forward passes that record gradients and calibrate, at first: scales grow to max|x| / 127 over them.
  int64_t batches = 16;

  bool operator==(const ActivationScales&) const = default;
};

}  // namespace qat
