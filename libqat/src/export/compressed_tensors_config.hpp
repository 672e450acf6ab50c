#pragma once

// `quantization_config` of a Compressed Tensors folder, and what its consumers make of it.

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "export/hf_plan.hpp"
#include "qat/export/export.hpp"

namespace qat {

/// One group per width, strategy and rounding of activations, with the modules it means, all of whose tensors
/// are symmetric integers.
nlohmann::ordered_json compressed_tensors_config(const QuantizedCheckpoint& checkpoint,
                                                 const std::vector<HfTensor>& plan);

/// vLLM computes some layers as one; parts on different grids do not load there.
std::vector<std::string> compressed_tensors_notes(const QuantizedCheckpoint& checkpoint,
                                                  const std::vector<HfTensor>& plan);

/// Packed experts that a consumer does not find by itself.
std::vector<Obstacle> compressed_tensors_cautions(const QuantizedCheckpoint& checkpoint);

}  // namespace qat
