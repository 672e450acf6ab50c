#include "train/training.hpp"

#include <cmath>

namespace qat::train {

Training::Training(PreparedModel& prepared, const Options& settings)
    : model(prepared),
      options(settings),
      parameters(model, options),
      weights(trained_weights(model)),
      optimizer(parameters.values(), options),
      scales(parameters.scales(), options, 0) {
  if (options.telemetry_every > 0) monitor.emplace(weights);
}

double Training::gradient_norm() const {
  return std::hypot(optimizer.gradient_norm(), scales.gradient_norm());
}

void Training::update(int64_t step, double gradient_norm) {
  const double rate = learning_rate_at(options, step);
  optimizer.update(step, rate, gradient_norm);
  scales.update(step, options.scale_learning_rate * (rate / options.learning_rate), gradient_norm);
}

void Training::clear_gradients() {
  optimizer.clear_gradients();
  scales.clear_gradients();
}

void Training::follow_grids(int64_t after) {
  scales = ScaleSteps(parameters.scales(), options, after);
  if (monitor) monitor->follow_grids();
}

void Training::add_state(std::vector<StateTensor>& tensors) const {
  for (std::size_t i = 0; i < parameters.trained().size(); ++i) {
    const NamedParameter& parameter = parameters.trained()[i];
    tensors.push_back({"latent/" + parameter.name, parameter.value});
    tensors.push_back({"exp_avg/" + parameter.name, optimizer.first_moments()[i]});
    tensors.push_back({"exp_avg_sq/" + parameter.name, optimizer.second_moments()[i]});
  }
  // Those that are held, too: they may come from elsewhere than from the weights.
  for (const NamedTensor& scale : model.scale_parameters()) {
    tensors.push_back({"scales/" + scale.name, scale.value});
  }
  scales.add_state(tensors);
  for (const auto& activation : model.activations()) {
    if (!activation->has_scale()) continue;
    if (!activation->learned()) tensors.push_back({"activation/" + activation->name(), activation->scale()});
    tensors.push_back({"activation_batches/" + activation->name(), activation->batches()});
  }
  for (const auto& buffer : model.module().named_buffers()) {
    tensors.push_back({"buffer/" + buffer.key(), buffer.value()});
  }
  if (monitor) monitor->add_state(tensors);
}

}  // namespace qat::train
