#include "mlp.hpp"

#include "fused.hpp"

namespace qat::models {

MlpImpl::MlpImpl(const DecoderConfig& config, int64_t layer)
    : activation_(config.activation),
      gate_proj_(config.hidden_size, config.layer(layer).intermediate_size, config.mlp_bias),
      up_proj_(config.hidden_size, config.layer(layer).intermediate_size, config.mlp_bias),
      down_proj_(config.layer(layer).intermediate_size, config.hidden_size, config.mlp_bias) {
  register_module("gate_proj", gate_proj_);
  register_module("up_proj", up_proj_);
  register_module("down_proj", down_proj_);
}

at::Tensor MlpImpl::gated(const at::Tensor& x) {
  return models::gated(gate_proj_(x), up_proj_(x), activation_);
}

}  // namespace qat::models
