// PARQ (Jin et al. 2025, arXiv:2503.15748): instead of rounding in forward, the weights that forward sees are
// drawn ever closer to the grid, while their latents collect the steps.

#include <ATen/TensorOperators.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/where.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "qat/ops/ops.hpp"
#include "train/schedule.hpp"

namespace qat::train {
namespace {

/// Falls from 1 at x = 0 to 0 at x = 1, along a mirrored sigmoid.
double slope_at(double x, double steepness) {
  const auto sigmoid = [&](double at) { return 1 / (1 + std::exp(steepness * (at - 0.5))); };
  return (sigmoid(x) - sigmoid(1)) / (sigmoid(0) - sigmoid(1));
}

/// Whether the levels of a scale rise or fall with their codes, so that neighbours have neighbouring codes.
bool ordered(const grid::Grid& grid, int64_t width) {
  const grid::Info& info = grid.info();
  std::vector<float> scales(static_cast<std::size_t>(grid.blocks(width) * grid.params()), 1.0f);
  std::vector<int8_t> codes(static_cast<std::size_t>(width));
  std::vector<float> level(codes.size());
  double last = 0, before = 0;
  for (int code = info.code_min; code <= info.code_max; ++code) {
    std::fill(codes.begin(), codes.end(), static_cast<int8_t>(code));
    grid.decode(codes.data(), width, scales.data(), level.data());
    const double change = static_cast<double>(level[0]) - last;
    if (code > info.code_min + 1 && change * before <= 0) return false;
    if (code > info.code_min) before = change;
    last = static_cast<double>(level[0]);
  }
  return true;
}

class ProxSchedule : public Schedule {
 public:
  explicit ProxSchedule(Training& training)
      : training_(training), until_(steps_of(training.options, training.options.prox.until)) {
    const c10::NoGradGuard no_grad;
    for (const TrainedWeight& weight : training.weights) {
      const grid::Grid& grid = grid::find(weight.quantizer->scheme().weight);
      if (!ordered(grid, weight.latent.numel() / weight.latent.size(0))) {
        throw ArgumentError("Trainer: options: prox: " + weight.name +
                            ": expected a grid whose levels follow its codes, got " +
                            std::string(grid.info().name));
      }
      latents_.push_back(weight.latent.detach().clone());
    }
  }
  ~ProxSchedule() override { blend(1); }

  void begin_step(int64_t step) override { blend(step <= until_ ? 0 : 1); }

  void before_update(int64_t step) override {
    if (step > 1 && step <= until_) exchange(/*restore=*/true);
  }

  void after_update(int64_t step) override {
    if (step >= until_) {
      blend(1);  // the latents are back, and rounding them is the end of the path
      return;
    }
    exchange(/*restore=*/false);
    const c10::NoGradGuard no_grad;
    const double rho =
        slope_at(static_cast<double>(step) / static_cast<double>(until_), training_.options.prox.steepness);
    for (const TrainedWeight& weight : training_.weights) draw(weight, rho);
  }

  /// "prox/<name>": the latents. What forward sees is in the parameters.
  void add_state(std::vector<StateTensor>& tensors) const override {
    for (std::size_t i = 0; i < latents_.size(); ++i) {
      tensors.push_back({"prox/" + training_.weights[i].name, latents_[i]});
    }
  }

 private:
  void blend(double value) {
    for (const TrainedWeight& weight : training_.weights) weight.quantizer->set_blend(value);
  }

  void exchange(bool restore) {
    const c10::NoGradGuard no_grad;
    for (std::size_t i = 0; i < latents_.size(); ++i) {
      at::Tensor parameter = training_.weights[i].latent.detach();
      if (restore) {
        parameter.copy_(latents_[i]);
      } else {
        latents_[i].copy_(parameter);
      }
    }
  }

  /// w <- clip(c + (w - c) / rho, lower, upper), with the two levels around w and their middle c.
  static void draw(const TrainedWeight& weight, double rho) {
    const grid::Info& info = grid::find(grid_of(*weight.quantizer)).info();
    at::Tensor latent = weight.latent.detach();
    const auto [codes, scales] = weight.quantizer->quantize(latent);
    const auto level = [&](const at::Tensor& code) {
      return ops::dequantize(code, scales, grid_of(*weight.quantizer), weight.name).view_as(latent);
    };
    const at::Tensor nearest = level(codes);
    const at::Tensor above = level(codes.clamp_max(info.code_max - 1).add_(1));
    const at::Tensor below = level(codes.clamp_min(info.code_min + 1).sub_(1));
    const at::Tensor towards = (latent - nearest).mul_(above - nearest).gt(0);
    const at::Tensor other = at::where(towards, above, below);
    const at::Tensor middle = (nearest + other).div_(2);
    const at::Tensor drawn = (latent - middle).div_(rho).add_(middle);
    latent.copy_(at::minimum(at::maximum(drawn, at::minimum(nearest, other)), at::maximum(nearest, other)));
  }

  Training& training_;
  int64_t until_;
  std::vector<at::Tensor> latents_;
};

}  // namespace

void add_prox(Schedules& schedules, Training& training) {
  if (training.options.prox.until > 0) schedules.push_back(std::make_unique<ProxSchedule>(training));
}

}  // namespace qat::train
