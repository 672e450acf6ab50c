#pragma once

// Which tokens of a calibration text matter. A layer's error counts where the model's answer depends on the
// layer, and that differs by orders of magnitude from token to token: the first tokens of a window have the
// largest activations of all and hardly any influence.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

#include "qat/prepare/prepare.hpp"
#include "qat/ptq/apply.hpp"
#include "qat/ptq/calibration.hpp"

namespace qat::ptq {

/// What one backward pass says of each quantized weight.
struct Sensitivity {
  TokenWeights tokens;       ///< of those that are multiplied with
  LookupCurvatures lookups;  ///< of those that are looked up, too: tables tied to a head
  OutputCurvatures outputs;  ///< of the first but not the second, with at most 32,768 rows
};

/// `tokens`: for each quantized linear layer and each token the mean over its output features of (dL/dy)^2. L
/// is the float model's cross-entropy with labels that are drawn from its own distribution at each position,
/// so that the expectation of the product of gradients is the Fisher information, the curvature of the KL
/// divergence to the float model. (Martens 2014, arXiv:1412.1193; per-token weights in layer-wise
/// quantization: Kim et al. 2025, GuidedQuant, arXiv:2505.07004)
///
/// Clipped at 8 times their mean, and scaled to mean 1: few tokens would outweigh all others.
///
/// Weighting a layer's inputs by them turns E[x x^T] into E[s x x^T], the Kronecker-factored curvature of
/// that loss with one factor per token.
///
/// `lookups`: an error e of the row that a token is looked up as adds to its residual stream, where the
/// curvature is E[g g^T], g = dL/d(row). Tokens are clipped as above, with the trace kept. Divided by the
/// mean over tokens of sum_o (dL/dy_o)^2 at the head, so that it stands beside E[s x x^T]: of a row, both
/// count as often as its token occurs, as an input there and, by the model's own probabilities, as an answer
/// here.
///
/// `outputs`: E[g g^T] of the gradients g = dL/dy at a layer's outputs, in groups of at most 1,024
/// neighbouring ones, so that its memory grows with the weights'. A token whose (dL/dy)^2 is above 8 times
/// the mean so far counts like one at that bound.
///
/// logits: int64[B, T] -> [B, T, V], the model that `model` was prepared from, on its own layers: quantizers
/// are switched off meanwhile. windows: int64[n, T]. batch: windows per call. The same seed gives the same
/// labels. Runs in autocast's dtype when autocast is on. Memory beside the model: the activations of `batch`
/// windows, as in training, but no gradients of weights; and n T h floats where the embedding is quantized;
/// and the curvatures, 4 KB a row.
///
/// ArgumentError for windows of another shape, for logits that depend on no parameter beside the quantized
/// weights; NumericError naming the weight for gradients that are not finite.
Sensitivity sensitivity(PreparedModel& model,
                        const std::function<at::Tensor(const at::Tensor& tokens)>& logits,
                        const at::Tensor& windows, int64_t seed = 0, int64_t batch = 2,
                        const Progress& progress = {});

/// Its tokens alone.
TokenWeights token_sensitivity(PreparedModel& model,
                               const std::function<at::Tensor(const at::Tensor& tokens)>& logits,
                               const at::Tensor& windows, int64_t seed = 0, int64_t batch = 2,
                               const Progress& progress = {});

}  // namespace qat::ptq
