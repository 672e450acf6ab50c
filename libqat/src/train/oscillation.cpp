// Nagel et al. 2022, arXiv:2203.11086: weights that keep jumping between two codes are held at the code that
// they had most (algorithm 1), or drawn to the middle of their cell (section 4.1).

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "qat/ops/ops.hpp"
#include "train/schedule.hpp"

namespace qat::train {
namespace {

class Freezing : public Schedule {
 public:
  explicit Freezing(Training& training) : training_(training) { begin_step(0); }

  /// A weight whose forward now uses another grid is forgotten: its codes mean something else.
  void begin_step(int64_t /*step*/) override {
    const c10::NoGradGuard no_grad;
    memories_.resize(training_.weights.size());
    for (std::size_t i = 0; i < memories_.size(); ++i) {
      const TrainedWeight& weight = training_.weights[i];
      if (memories_[i].grid != grid_of(*weight.quantizer)) memories_[i] = remember(weight);
    }
  }

  void after_update(int64_t /*step*/) override {
    const c10::NoGradGuard no_grad;
    for (std::size_t i = 0; i < memories_.size(); ++i) update(training_.weights[i], memories_[i]);
  }

  /// "oscillation/frequency/<name>" and ".../mean_code/<name>" float32[R, N], ".../code/<name>",
  /// ".../direction/<name>" and ".../held/<name>" int8[R, N].
  void add_state(std::vector<StateTensor>& tensors) const override {
    for (std::size_t i = 0; i < memories_.size(); ++i) {
      const auto add = [&](const char* what, const at::Tensor& value) {
        tensors.push_back({std::string("oscillation/") + what + "/" + training_.weights[i].name, value});
      };
      add("frequency", memories_[i].frequency);
      add("mean_code", memories_[i].mean_code);
      add("code", memories_[i].code);
      add("direction", memories_[i].direction);
      add("held", memories_[i].held);
    }
  }

 private:
  struct Memory {
    std::string grid;
    at::Tensor frequency;  ///< of turns, an exponential average
    at::Tensor mean_code;  ///< the same of the codes; the code itself once the weight is held
    at::Tensor code, direction, held;
  };

  static Memory remember(const TrainedWeight& weight) {
    const at::Tensor codes = std::get<0>(weight.quantizer->quantize(weight.latent));
    const at::Tensor mean = codes.to(at::kFloat);
    return {grid_of(*weight.quantizer), at::zeros_like(mean), mean, codes,
            at::zeros_like(codes),      at::zeros_like(codes)};
  }

  void update(const TrainedWeight& weight, Memory& memory) const {
    const double m = training_.options.oscillation.momentum;
    const auto [codes, scales] = weight.quantizer->quantize(weight.latent);
    const at::Tensor changed = codes.ne(memory.code);
    const at::Tensor direction = codes.gt(memory.code).to(at::kChar).mul_(2).sub_(1);
    const at::Tensor turned = memory.direction.mul(direction).eq_(-1).logical_and_(changed);
    memory.frequency.lerp_(turned.to(at::kFloat), m);
    memory.direction.copy_(at::where(changed, direction, memory.direction));
    const at::Tensor free = memory.held.eq(0);
    memory.mean_code.copy_(at::where(free, memory.mean_code.lerp(codes.to(at::kFloat), m), memory.mean_code));
    const at::Tensor caught = memory.frequency.gt(training_.options.oscillation.freeze_above);
    memory.held.copy_(memory.held.logical_or(caught));
    const at::Tensor held = memory.held.to(at::kBool);
    memory.mean_code.copy_(at::where(held, memory.mean_code.round(), memory.mean_code));
    memory.code.copy_(at::where(held, memory.mean_code.to(at::kChar), codes));
    const at::Tensor value = ops::dequantize(memory.code, scales, memory.grid, weight.name);
    at::Tensor latent = weight.latent.detach();
    latent.copy_(at::where(held.view_as(latent), value.view_as(latent), latent));
  }

  Training& training_;
  std::vector<Memory> memories_;
};

/// Adds the gradient of lambda * sum (w - w_hat)^2 over the weights inside their range, w_hat constant;
/// lambda rises to options.oscillation.damping along half a cosine.
class Damping : public Schedule {
 public:
  explicit Damping(Training& training) : training_(training) {}

  void before_update(int64_t step) override {
    const c10::NoGradGuard no_grad;
    constexpr double kPi = 3.14159265358979323846;
    const double done = static_cast<double>(step) / static_cast<double>(training_.options.steps);
    const double lambda = training_.options.oscillation.damping * 0.5 * (1 - std::cos(kPi * done));
    for (const TrainedWeight& weight : training_.weights) {
      if (!weight.latent.grad().defined()) continue;
      const Quantizer& quantizer = *weight.quantizer;
      const auto [codes, scales] = quantizer.quantize(weight.latent);
      const at::Tensor latent = weight.latent.detach();
      const at::Tensor restored = ops::dequantize(codes, scales, grid_of(quantizer), weight.name);
      const at::Tensor pull = latent.sub(restored.view_as(latent)).mul_(2 * lambda);
      weight.latent.mutable_grad().add_(where_in_range(weight, pull));
    }
  }

 private:
  Training& training_;
};

}  // namespace

void add_oscillation(Schedules& schedules, Training& training) {
  const Oscillation& options = training.options.oscillation;
  if (options.damping > 0) schedules.push_back(std::make_unique<Damping>(training));
  if (options.freeze_above > 0) schedules.push_back(std::make_unique<Freezing>(training));
}

}  // namespace qat::train
