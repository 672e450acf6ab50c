#include "train/code_monitor.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <utility>

#include "qat/grid/grid.hpp"
#include "qat/ops/ops.hpp"

namespace qat::train {
namespace {

double sum_of_squares(const at::Tensor& tensor) {
  const double norm = at::linalg_vector_norm(tensor).item<double>();
  return norm * norm;
}

}  // namespace

CodeMonitor::CodeMonitor(std::vector<Weight> weights) : weights_(std::move(weights)) {
  const c10::NoGradGuard no_grad;
  for (const Weight& weight : weights_) {
    codes_.push_back(
        std::get<0>(ops::quantize(weight.latent, weight.grid, weight.scale, weight.name, weight.scales)));
  }
}

CodeMonitor::Measurement CodeMonitor::measure() {
  const c10::NoGradGuard no_grad;
  double error = 0, power = 0;
  int64_t flips = 0, total = 0;
  for (std::size_t i = 0; i < weights_.size(); ++i) {
    const Weight& weight = weights_[i];
    const auto [codes, scales] =
        ops::quantize(weight.latent, weight.grid, weight.scale, weight.name, weight.scales);
    flips += codes.ne(codes_[i]).sum().item<int64_t>();
    total += codes.numel();
    codes_[i].copy_(codes);
    const at::Tensor restored = ops::dequantize(codes, scales, weight.grid, weight.name);
    error += sum_of_squares(restored.view_as(weight.latent).sub_(weight.latent));
    power += sum_of_squares(weight.latent);
  }
  if (total == 0) return {0, 0};
  return {static_cast<double>(flips) / static_cast<double>(total), power > 0 ? std::sqrt(error / power) : 0};
}

std::vector<CodeMonitor::Weight> trained_weights(const PreparedModel& model) {
  std::vector<CodeMonitor::Weight> weights;
  for (std::size_t i = 0; i < model.slots().size(); ++i) {
    const auto& quantizer = model.quantizers()[i];
    if (!quantizer || grid::find(quantizer->scheme().weight).info().is_float) continue;
    const at::Tensor latent = model.slots()[i].get();
    if (latent.requires_grad())
      weights.push_back({model.slots()[i].name, latent, quantizer->scheme().weight,
                         quantizer->estimator().scale, quantizer->scales()});
  }
  return weights;
}

}  // namespace qat::train
