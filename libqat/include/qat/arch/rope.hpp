#pragma once

// The rotary embedding: its base, and the scalings that stretch a model's context. Position t turns the pair
// i of a head of D by t * theta^(-2i/D) / divisor_i; every scaling here is a list of divisors (and one factor
// on cosines and sines). Formulas: transformers `modeling_rope_utils.py`; llama.cpp computes the same.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace qat::arch {

/// How a rotary embedding is stretched to longer contexts.
enum class RopeType {
  kDefault,
  /// Every divisor is `factor`. (kaiokendev 2023)
  kLinear,
  /// 1 for short wavelengths, `factor` for long ones, a ramp between. (Llama 3.1)
  kLlama3,
  /// A ramp over the pairs' numbers, and `attention_factor`. (Peng et al. 2023, arXiv:2309.00071)
  kYarn,
  /// Only the first `share` of the pairs turns, with the frequencies of the whole head. (Gemma 4)
  kProportional,
};

/// "default", "linear", "llama3", "yarn" or "proportional".
std::string_view to_string(RopeType type) noexcept;

/// A model's rotary embedding.
struct Rope {
  double theta = 10000.0;
  RopeType type = RopeType::kDefault;
  double factor = 1.0;
  double original_context = 0.0;  ///< tokens; llama3 and yarn
  double low_freq_factor = 1.0;   ///< llama3: wavelengths above original_context / this are divided fully
  double high_freq_factor = 4.0;  ///< llama3: those below original_context / this are not divided
  double beta_fast = 32.0;        ///< yarn: turns in original_context from which a pair is not divided
  double beta_slow = 1.0;         ///< yarn: turns below which it is divided fully
  double attention_factor = 1.0;  ///< yarn: multiplies cosines and sines
  double share = 1.0;             ///< proportional: of the pairs that turn, "partial_rotary_factor"

  bool operator==(const Rope&) const = default;
};

/// A value of a configuration: nothing when it is absent or null. Integers come as double; an object or an
/// array that is there, as true.
using ConfigValue = std::variant<std::monostate, bool, double, std::string>;
/// Looks a dotted path up: "rope_parameters.factor"; a number is an index into an array, "layer_types.3".
using ConfigLookup = std::function<ConfigValue(std::string_view path)>;

/// Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (older files).
/// ArgumentError naming the key for what is missing, of another type or out of range; UnsupportedError naming
/// the key for other rope types, partial rotary embeddings and YaRN without truncation.
Rope read_rope(const ConfigLookup& lookup);

/// Layers that share a rotary embedding, where a model has two.
enum class RopeLayers { kFull, kSliding };

/// The same for one of two: `rope_parameters.full_attention` and `.sliding_attention` (transformers 5), or
/// `rope_theta` with `rope_scaling`, and `rope_local_base_freq` (older files). `fallback`: what holds for a
/// configuration with none of them.
Rope read_rope(const ConfigLookup& lookup, RopeLayers layers, const Rope& fallback);

/// Throws ArgumentError naming the first value that is out of range.
void validate(const Rope& rope);

/// The divisor of a pair that does not turn. (llama.cpp conversion/gemma.py)
inline constexpr double kNoTurn = 1e30;

/// One divisor per pair, [head_dim / 2]; all 1 for the default.
std::vector<double> rope_divisors(const Rope& rope, std::int64_t head_dim);

/// The factor that YaRN puts on cosines and sines unless told otherwise: 0.1 ln(factor) + 1.
double yarn_attention_factor(double factor);

/// The scaling behind the divisors of a GGUF file (`rope_freqs.weight`): default, linear, proportional, or
/// the llama3 parameters that give these divisors within 1e-6 of themselves. The file does not say the
/// parameters, and only their ratios count: published models have low_freq_factor 1, so that is what is
/// preferred. Nothing when there are none.
std::optional<Rope> rope_of_divisors(const std::vector<float>& divisors, double theta);

/// GGUF's keys for a scaling, behind "<architecture>.rope.scaling.". (llama.cpp llama-arch.cpp)
namespace rope_key {
inline constexpr std::string_view kType = "type";
inline constexpr std::string_view kFactor = "factor";
inline constexpr std::string_view kOriginalContext = "original_context_length";
/// attention_factor / yarn_attention_factor(factor)
inline constexpr std::string_view kAttentionFactor = "attn_factor";
}  // namespace rope_key

/// The F32 tensor that holds the divisors in families whose `gguf_only` lists it.
inline constexpr std::string_view kRopeDivisors = "rope_freqs.weight";

}  // namespace qat::arch
