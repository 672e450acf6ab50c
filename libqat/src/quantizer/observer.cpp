#include "qat/quantizer/observer.hpp"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "qat/core/error.hpp"

namespace qat {
namespace {

/// Checkpointing runs a layer's forward a second time, inside the backward pass.
bool recomputing() {
  return torch::autograd::get_current_graph_task_id() != -1;
}

}  // namespace

void RangeObserver::observe(const at::Tensor& x, const std::string& tensor) {
  if (!calibrating_ || recomputing()) return;
  const at::NoGradGuard no_grad;
  const double seen = x.numel() == 0 ? 0.0 : x.detach().abs().max().item<double>();
  if (!std::isfinite(seen)) {
    throw NumericError("observer: " + (tensor.empty() ? "activations" : tensor) +
                       ": expected finite activations, got NaN or an infinity");
  }
  largest_ = std::max(largest_, seen);
  ++batches_;
}

}  // namespace qat
