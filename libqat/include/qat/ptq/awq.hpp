#pragma once

// AWQ: input channels with large activations get finer steps, by scaling their weights up and what produces
// the inputs down, which changes nothing in the float model. (Lin et al. 2023, arXiv:2306.00978)
//
//     y = W x = (W diag(s)) (diag(1/s) x),   s_i = E[|x_i|]^alpha / sqrt(max_k m_k min_k m_k), m =
//     E[|x|]^alpha
//
// alpha is the one of 0, 1/steps, ... 1 whose rounded weights err least in the outputs,
// tr(E H E^T) with E = W - Q(W diag(s)) diag(1/s) and H = E[x x^T]. Everything is measured on the float
// model.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "qat/prepare/prepare.hpp"
#include "qat/ptq/apply.hpp"
#include "qat/ptq/gptq.hpp"
#include "qat/quantizer/stage.hpp"

namespace qat::ptq {

/// Settings of AWQ; JSON and Python use the same names.
struct AwqOptions {
  int64_t steps = 20;                          ///< of alpha between 0 and 1
  ScaleSource scale = ScaleSource::kWeighted;  ///< of the grid's scales, in the search and in the end
  /// Rows of each weight, evenly spaced, that the search for alpha measures; 0 for all. The choice is one
  /// number for all of them.
  int64_t rows = 128;
};

/// The choice for layers that read the same input.
struct AwqScale {
  at::Tensor scale;  ///< s, float32[N], above zero
  double alpha = 0.0;
  double error = 1.0;  ///< squared error of the outputs over that of alpha = 0
};

/// weights: float32[R_k, N], all multiplied with the same input; grids: of each, one with codes; hessian:
/// float [N, N]; magnitude: float[N], E[|x|]. producer_rows as in Stage: inputs of the same row get the same
/// s, from the mean of their magnitudes. Errors as for gptq.
AwqScale awq_scale(const std::vector<at::Tensor>& weights, const std::vector<std::string>& grids,
                   const at::Tensor& hessian, const at::Tensor& magnitude, const AwqOptions& options = {},
                   const std::vector<int64_t>& producer_rows = {}, std::string_view tensor = "");

/// What was folded where.
struct AwqFold {
  std::vector<std::string> producers;  ///< divided by s
  std::vector<std::string> weights;    ///< multiplied by s
  double alpha = 0.0;
  double error = 1.0;  ///< see AwqScale
};

/// Folds s into every stage of the model that has producers and a quantized weight, then sets the grid's
/// scales of all weights of the stages. The float function is unchanged but for float32 rounding of the
/// products. `model` as for apply_gptq, which may follow; its slots must be the float weights of the stages,
/// too. Weights in no stage keep their scales. Returns the folds in model order.
std::vector<AwqFold> apply_awq(PreparedModel& model, const std::vector<Stage>& stages,
                               const at::Tensor& windows, const AwqOptions& options = {},
                               const CalibrationOptions& calibration = {});

}  // namespace qat::ptq
