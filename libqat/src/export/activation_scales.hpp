#pragma once

// The static scales of activations among a checkpoint's floats, and what a folder has of them.

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "export/hf_plan.hpp"
#include "qat/checkpoint/checkpoint.hpp"

namespace qat {

inline constexpr const char* kInputScale = ".input_activation_scale";
inline constexpr const char* kOutputScale = ".output_activation_scale";
inline constexpr const char* kKeyScale = ".k_cache_scale";
inline constexpr const char* kValueScale = ".v_cache_scale";

/// Whether the key names the static scale of a layer's inputs or outputs, or of its keys or values: float32
/// in every model.
bool is_activation_scale(std::string_view key);
/// Whether it is one of keys or values.
bool is_cache_scale(std::string_view key);

/// Key -> scale.
using ActivationScaleMap = std::map<std::string, float>;

/// The scale of `part` (kInputScale, kOutputScale) of a module that the plan writes; 0: its activations stay
/// as they are. Those of a head that is tied to an embedding may go by the embedding's name. ArgumentError
/// for one that is not one number.
float activation_scale(const QuantizedCheckpoint& checkpoint, const HfTensor& planned, const char* part);

/// All scales but zeros of the quantized linear layers of a plan, by the keys that the folder gives them, and
/// those of keys and values if wanted.
ActivationScaleMap planned_scales(const QuantizedCheckpoint& checkpoint, const std::vector<HfTensor>& plan,
                                  bool caches);

}  // namespace qat
