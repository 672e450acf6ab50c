#pragma once

// Language-model quality of several candidates against one reference, on the same tokens in the same pass.

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

namespace qat::eval {

/// tokens: int64[B, T] -> logits [B, T, V] of any float dtype. Called without gradients.
using LogitsFunction = std::function<at::Tensor(const at::Tensor& tokens)>;

/// How a text is cut and watched.
struct Options {
  int64_t window =
      256;            ///< T: tokens are cut into windows of this length; each predicts its T - 1 last tokens
  int64_t batch = 4;  ///< B: windows per call
  /// Called after each batch with predicted tokens done and in all; return false to stop (Interrupted score
  /// sums).
  std::function<bool(int64_t done, int64_t total)> progress;
};

/// Means over predicted tokens. Windows are kept apart so that intervals can be bootstrapped: see
/// bootstrap.hpp. All window vectors have one entry per window, in text order.
struct Score {
  int64_t tokens = 0;              ///< predicted tokens
  double nll = 0;                  ///< mean negative log-likelihood, nats
  double kl = 0;                   ///< mean KL(reference || candidate), nats
  double top1 = 0;                 ///< share of positions whose argmax equals the reference's
  std::vector<double> window_nll;  ///< mean over each window's predictions
  std::vector<double> window_kl;
  std::vector<double> window_top1;
  std::vector<int64_t> window_tokens;  ///< predicted tokens of each window: the weight of its means
  double perplexity() const;           ///< exp(nll)
};

/// Scores `reference` itself (kl 0, top1 1) and each candidate. tokens: int64[n], n >= 2; the last, shorter
/// window is used too. Log-probabilities in float32, sums in double. ArgumentError for empty text or logits
/// of another shape. Returns 1 + candidates.size() scores, the reference's first.
std::vector<Score> compare(const LogitsFunction& reference, const std::vector<LogitsFunction>& candidates,
                           const at::Tensor& tokens, const Options& options = {});

/// Share of what quantization took that training won back: 1 - trained / quantized, for KL or for a loss
/// difference. NaN when `quantized` is not positive.
double share_removed(double quantized, double trained) noexcept;

}  // namespace qat::eval
