#include "qat/ptq/layer_sensitivity.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "ptq/check.hpp"
#include "ptq/no_autocast.hpp"
#include "ptq/symmetric_sums.hpp"
#include "qat/core/error.hpp"
#include "qat/ptq/calibration.hpp"

namespace qat::ptq {
namespace {

/// In means: a hundredth of the tokens would carry up to a third of the sum, and the result fit them alone.
constexpr double kMostWeight = 8.0;
/// Outputs whose errors count together: 4 KB a row. Of SmolLM2's 1,536, groups of 512 cost 3 % of the KL.
constexpr int64_t kGroup = 1024;
/// Heads have more: their memory would be that of the layers.
constexpr int64_t kMostOutputs = 32768;

/// sizes / mean, clipped; of mean 1.
at::Tensor clipped(const at::Tensor& sizes, double mean) {
  const at::Tensor shares = (sizes / mean).clamp_max(kMostWeight);
  return shares / shares.mean(at::kDouble).item<double>();
}

double finite(double mean, const std::string& tensor) {
  if (std::isfinite(mean)) return mean;
  throw NumericError("token_sensitivity: " + tensor + ": expected finite gradients, got others");
}

}  // namespace

LayerSensitivity::LayerSensitivity(std::string tensor) : tensor_(std::move(tensor)) {}

int64_t LayerSensitivity::expect(int64_t tokens) {
  squares_.push_back(at::zeros({tokens}, at::kFloat));
  return static_cast<int64_t>(squares_.size()) - 1;
}

void LayerSensitivity::add(int64_t place, const at::Tensor& gradient) {
  const at::NoGradGuard no_grad;
  const NoAutocast own_dtype;
  if (place < 0 || place >= static_cast<int64_t>(squares_.size())) {
    throw ArgumentError("LayerSensitivity.add: " + tensor_ + ": expected a place that expect gave, got " +
                        std::to_string(place));
  }
  at::Tensor& own = squares_[static_cast<size_t>(place)];
  const int64_t width = gradient.dim() > 0 ? gradient.size(-1) : 0;
  if (width == 0 || (width_ != 0 && width != width_) || gradient.numel() != own.numel() * width) {
    fail({"LayerSensitivity.add", tensor_}, "gradients of " + std::to_string(own.numel()) + " tokens",
         describe(gradient));
  }
  width_ = width;
  const at::Tensor flat = gradient.detach().reshape({-1, width_});
  const at::Tensor g = flat.to(at::kFloat);
  const at::Tensor squares = (g * g).mean(-1);
  own += squares.cpu();
  sum_ += squares.sum(at::kDouble).item<double>();
  count_ += squares.numel();
  if (width_ <= kMostOutputs) add_curvature(flat, squares);
}

/// Takes the tokens of one call.
void LayerSensitivity::add_curvature(const at::Tensor& gradient, const at::Tensor& squares) {
  const int64_t groups = (width_ + kGroup - 1) / kGroup, size = (width_ + groups - 1) / groups;
  if (!curvature_.defined()) curvature_ = at::zeros({groups, size, size}, at::kFloat);
  const double most = kMostWeight * sum_ / static_cast<double>(count_);
  if (!(most > 0) || !std::isfinite(most)) return;
  // Divided by the bound's root, too, so that products of small gradients are no subnormals.
  const at::Tensor factors = (squares.unsqueeze(1) / most).clamp_min(1).rsqrt() / std::sqrt(most);
  const at::Tensor g = gradient * factors;
  for (int64_t k = 0; k < groups; ++k) {
    const int64_t count = std::min(size, width_ - k * size);
    const at::Tensor part = g.narrow(1, k * size, count).to(gradient.scalar_type());
    add_products(curvature_[k].narrow(0, 0, count).narrow(1, 0, count), part, most);
  }
}

void LayerSensitivity::add_lookups(const at::Tensor& gradient) {
  lookups_.push_back(gradient.detach().to(at::kFloat).reshape({-1, gradient.size(-1)}).cpu());
}

double LayerSensitivity::mean_square() const {
  return count_ == 0 ? 0.0 : finite(sum_ / static_cast<double>(count_), tensor_);
}

bool LayerSensitivity::counts() const {
  return mean_square() > 0;
}

at::Tensor LayerSensitivity::tokens() const {
  return clipped(at::cat(squares_), mean_square());
}

at::Tensor LayerSensitivity::outputs() const {
  if (!lookups_.empty() || !curvature_.defined()) return {};
  return from_upper(curvature_) / static_cast<double>(count_);
}

at::Tensor LayerSensitivity::lookups() const {
  if (lookups_.empty()) return {};
  const at::Tensor rows = at::cat(lookups_);
  const at::Tensor sizes = (rows * rows).sum(-1);
  const double size = finite(sizes.mean(at::kDouble).item<double>(), tensor_);
  if (size <= 0) return {};
  // So that the square of each gradient becomes its clipped share of their sum.
  const at::Tensor factors = clipped(sizes, size) / (sizes / size).clamp_min(1e-20);
  InputMoments moments(rows.size(-1));
  moments.add(rows, factors);
  return moments.second() / (mean_square() * static_cast<double>(width_));
}

}  // namespace qat::ptq
