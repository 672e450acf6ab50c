#pragma once

// A prepared model that goes on from what has shipped already.

#include "qat/checkpoint/checkpoint.hpp"
#include "qat/prepare/prepare.hpp"

namespace qat {

/// Makes a checkpoint's numbers those of the model: its dequantized weights the latents (see `load_state`),
/// its scales the learned scales, its static activation scales those of the activations (scales that it lacks
/// stay as they are). Without a step of training, `freeze` then gives back every code and scale. `model`:
/// prepared with learned scales on the checkpoint's grids. ArgumentError for another grid (convert_tensors
/// moves a checkpoint), for a quantizer without learned scales, and for tensors that do not fit; nothing is
/// changed then.
void take_up(PreparedModel& model, const QuantizedCheckpoint& checkpoint);

}  // namespace qat
