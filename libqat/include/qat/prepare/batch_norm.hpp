#pragma once

// BatchNorm beside quantized weights. What ships is a weight on its grid; a BatchNorm behind it either stays
// a layer of its own, with statistics that no longer move under the rounding (freeze), or disappears into the
// weight before that is rounded (fold). (Jacob et al. 2018, arXiv:1712.05877, section 3.2; Krishnamoorthi
// 2018, arXiv:1806.08342, section 3.2.2.)

#include <torch/nn/module.h>

#include <cstdint>
#include <string>

namespace qat {

/// Puts every torch::nn::BatchNorm1d/2d/3d under `module` (itself included) into evaluation mode: forward
/// uses the running statistics and no longer updates them, gain and bias train on. Returns how many there
/// are. `module.train()` takes it back, as it does for every eval(): call this after each train().
int64_t freeze_batch_norm(torch::nn::Module& module);

/// Folds a BatchNorm with running statistics into the layer before it, in double precision, channel by
/// channel:
///     s = gain / sqrt(running_var + eps),   weight' = weight * s,   bias' = (bias - running_mean) * s +
///     shift
/// `layer`, `batch_norm`: paths under `root` ("features.0.conv"). The layer is a torch::nn::Linear,
/// Conv1d/2d/3d or ConvTranspose1d/2d/3d whose output nothing but the BatchNorm reads (which only the caller
/// can know); it gets a bias if it had none. The BatchNorm becomes the exact identity and leaves the tree of
/// modules: forward may go on calling it, `train()` and `parameters()` no longer reach it, and a checkpoint
/// has no tensor of it. Call it before `prepare`, so that each output channel's scale fits the folded weight,
/// and before the optimizer is made. ArgumentError naming the path for other layers, channels that do not
/// agree, and a BatchNorm without running statistics; nothing is changed then.
void fold_batch_norm(torch::nn::Module& root, const std::string& layer, const std::string& batch_norm);

}  // namespace qat
