#include "train/code_monitor.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <array>
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

double count(const at::Tensor& mask) {
  return static_cast<double>(mask.sum().item<int64_t>());
}

/// The weights whose unrounded code is outside the code range.
double clipped(const TrainedWeight& weight) {
  const at::Tensor one = at::ones({1}, weight.latent.options()).expand_as(weight.latent);
  return count(where_in_range(weight, one).eq(0));
}

/// The codes of a grid that no weight has.
int unused(const at::Tensor& codes, const grid::Info& info) {
  const at::Tensor dense = codes.cpu().contiguous();
  const auto* code = dense.const_data_ptr<int8_t>();
  const int64_t size = dense.numel();
  std::array<bool, 256> used{};
  int missing = info.code_max - info.code_min + 1;
  for (int64_t i = 0; i < size && missing > 0; ++i) {
    bool& seen = used[static_cast<std::size_t>(code[i] + 128)];
    missing -= seen ? 0 : 1;
    seen = true;
  }
  return missing;
}

/// The sum over all scales of their squared change in units of their field's mean.
double drift(const at::Tensor& scales, const at::Tensor& start, const std::string& grid) {
  const at::Tensor unit = field_means(start, field_sizes(grid::find(grid)));
  const at::Tensor change = (scales - start).div_(unit).masked_fill_(unit.eq(0), 0);
  return sum_of_squares(change);
}

/// Unused codes and codes, of the tensors of one grid.
struct Levels {
  double unused = 0, all = 0;
};

}  // namespace

struct CodeMonitor::Sums {
  double weights = 0, flips = 0, turns = 0, clipped = 0, error = 0, power = 0, scales = 0, drift = 0;
  std::map<std::string, Levels> levels;
};

CodeMonitor::Memory CodeMonitor::remember(const TrainedWeight& weight) {
  const c10::NoGradGuard no_grad;
  const auto [codes, scales] = weight.quantizer->quantize(weight.latent);
  return {grid_of(*weight.quantizer), codes, at::zeros_like(codes), scales};
}

CodeMonitor::CodeMonitor(std::vector<TrainedWeight> weights) : weights_(std::move(weights)) {
  for (const TrainedWeight& weight : weights_) memories_.push_back(remember(weight));
}

void CodeMonitor::follow_grids() {
  for (std::size_t i = 0; i < weights_.size(); ++i) {
    if (memories_[i].grid != grid_of(*weights_[i].quantizer)) memories_[i] = remember(weights_[i]);
  }
}

void CodeMonitor::add(const TrainedWeight& weight, Memory& memory, Sums& sums) {
  const auto [codes, scales] = weight.quantizer->quantize(weight.latent);
  const at::Tensor changed = codes.ne(memory.codes);
  const at::Tensor direction = codes.gt(memory.codes).to(at::kChar).mul_(2).sub_(1);
  sums.flips += count(changed);
  sums.turns += count(memory.direction.mul(direction).eq_(-1).logical_and_(changed));
  sums.weights += static_cast<double>(codes.numel());
  memory.direction.copy_(at::where(changed, direction, memory.direction));
  memory.codes.copy_(codes);

  const at::Tensor restored = ops::dequantize(codes, scales, memory.grid, weight.name);
  sums.error += sum_of_squares(restored.view_as(weight.latent).sub_(weight.latent));
  sums.power += sum_of_squares(weight.latent);
  sums.clipped += clipped(weight);
  sums.scales += static_cast<double>(scales.numel());
  sums.drift += drift(scales, memory.scales, memory.grid);
  const grid::Info& info = grid::find(memory.grid).info();
  Levels& levels = sums.levels[memory.grid];
  levels.unused += unused(codes, info);
  levels.all += info.code_max - info.code_min + 1;
}

CodeMonitor::Measurement CodeMonitor::measure() {
  const c10::NoGradGuard no_grad;
  Sums sums;
  for (std::size_t i = 0; i < weights_.size(); ++i) add(weights_[i], memories_[i], sums);
  Measurement result;
  if (sums.weights == 0) return result;
  result.flip_rate = sums.flips / sums.weights;
  result.oscillation = sums.turns / sums.weights;
  result.clip_rate = sums.clipped / sums.weights;
  result.scale_drift = std::sqrt(sums.drift / sums.scales);
  if (sums.power > 0) result.distance_to_grid = std::sqrt(sums.error / sums.power);
  for (const auto& [grid, levels] : sums.levels) result.dead_codes[grid] = levels.unused / levels.all;
  return result;
}

void CodeMonitor::add_state(std::vector<StateTensor>& tensors) const {
  for (std::size_t i = 0; i < weights_.size(); ++i) {
    tensors.push_back({"codes/" + weights_[i].name, memories_[i].codes});
    tensors.push_back({"direction/" + weights_[i].name, memories_[i].direction});
    tensors.push_back({"start_scales/" + weights_[i].name, memories_[i].scales});
  }
}

}  // namespace qat::train
