#pragma once

#include <vector>

#include "qat/models/config.hpp"
#include "qat/quantizer/stage.hpp"
#include "trunk.hpp"

namespace qat::models {

/// The forward pass of a decoder in stages, see Decoder::stages. The stages keep the trunk alive.
std::vector<Stage> make_stages(const Trunk& trunk, const DecoderConfig& config);

}  // namespace qat::models
