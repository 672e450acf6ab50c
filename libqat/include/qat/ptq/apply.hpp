#pragma once

// Whole models: weights are rounded in the order of the forward pass, each by the inputs that it gets when
// everything in front of it is rounded already.
//
//     model.set... prepared with learned scales (Policy::with_estimator, {"kind": "lsq"})
//     apply_gptq(model, decoder->stages(), windows);      // windows: int64[n, T] of a calibration text
//     save(freeze(model), "gptq.qat.safetensors");        // or train on from here
//
// Memory beside the model: the state between two stages for all windows (a decoder's takes n T (h + I)
// floats) and the moments of one layer's inputs.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "qat/prepare/prepare.hpp"
#include "qat/ptq/calibration.hpp"
#include "qat/ptq/gptq.hpp"
#include "qat/quantizer/stage.hpp"

namespace qat::ptq {

/// Called after each piece of work: pieces done, in all, and the weight that is being calibrated. May throw
/// to stop; the weights rounded until then stay rounded.
using Progress = std::function<void(int64_t done, int64_t total, const std::string& tensor)>;

/// How calibration windows go through the model.
struct CalibrationOptions {
  int64_t batch = 8;              ///< windows per forward call
  TokenWeights tokens = {};       ///< empty: all tokens count alike
  LookupCurvatures lookups = {};  ///< empty: tied tables count as heads alone
  OutputCurvatures outputs = {};  ///< used with GptqOptions::sweeps; empty: outputs count alike and apart
  /// The share of `input_correction`. Above 0 the float model's windows go through the stages, too: memory
  /// for a second state.
  double input_correction = 0.0;
  Progress progress = {};
};

/// What became of one weight.
struct RoundedTensor {
  std::string name;
  std::string grid;
  /// RMS of the error of the layer's outputs over the RMS of its outputs, on the calibration windows as the
  /// rounded layers in front pass them on.
  double output_error = 0.0;
  /// What its error alone is expected to add to the KL divergence to the float model, nats per token, see
  /// expected_kl; of methods with gradients (guided), and not of tables.
  std::optional<double> expected_kl = {};
};

/// GPTQ on every quantized weight of the stages, see gptq. `model` must have been prepared with learned
/// scales; latents and scales become those of the method's solution. Weights in no stage (embeddings) keep
/// theirs. A table in a tied stage is rounded before all others, by the inputs of the float model's head; on
/// a grid of more than 64 levels it keeps its weights and scales, too. windows: int64[n, T]. Runs in
/// autocast's dtype when autocast is on.
///
/// ArgumentError for quantizers without learned scales, for a weight in a stage that `model` has no slot for,
/// and for options out of range; NumericError, naming the weight, for inputs that are not finite.
std::vector<RoundedTensor> apply_gptq(PreparedModel& model, const std::vector<Stage>& stages,
                                      const at::Tensor& windows, const GptqOptions& options = {},
                                      const CalibrationOptions& calibration = {});

/// The same without compensation: only the scales change, to those of weighted_search with the second moment
/// of each input as its importance.
std::vector<RoundedTensor> apply_weighted_search(PreparedModel& model, const std::vector<Stage>& stages,
                                                 const at::Tensor& windows,
                                                 const CalibrationOptions& calibration = {});

}  // namespace qat::ptq
