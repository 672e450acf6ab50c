#include "qat/prepare/batch_norm.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/zeros.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include <memory>
#include <vector>

#include "prepare/slots.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

using torch::nn::Module;

/// Calls f with the module as the first of `Types` that it is; false when it is none of them.
template <class... Types, class F>
bool visit_as(Module& module, const F& f) {
  const auto try_one = [&](auto* typed) {
    if (typed != nullptr) f(*typed);
    return typed != nullptr;
  };
  return (try_one(dynamic_cast<Types*>(&module)) || ...);
}

template <class F>
bool visit_batch_norm(Module& module, const F& f) {
  using namespace torch::nn;
  return visit_as<BatchNorm1dImpl, BatchNorm2dImpl, BatchNorm3dImpl>(module, f);
}

/// y = gain * x + shift, per channel, float64[C].
struct Affine {
  at::Tensor gain, shift;
};

/// A submodule, its parent, and its name there.
struct Place {
  Module* parent;
  std::string name;
  std::shared_ptr<Module> module;
};

Place find(Module& root, const std::string& path) {
  Module* parent = &root;
  std::string rest = path;
  for (size_t dot = 0; (dot = rest.find('.')) != std::string::npos; rest.erase(0, dot + 1)) {
    const auto* child = parent->named_children().find(rest.substr(0, dot));
    if (child == nullptr) break;
    parent = child->get();
  }
  const auto children = parent->named_children();
  const auto* found = children.find(rest);
  if (found == nullptr) {
    throw ArgumentError("fold_batch_norm: " + path +
                        ": expected the path of a module, got none of that name");
  }
  return {parent, rest, *found};
}

Affine affine_of(const Place& place, const std::string& path) {
  Affine affine;
  const bool known = visit_batch_norm(*place.module, [&](auto& norm) {
    if (!norm.running_mean.defined() || !norm.running_var.defined()) return;
    affine.gain = 1.0 / at::sqrt(norm.running_var.to(at::kDouble) + norm.options.eps());
    if (norm.weight.defined()) affine.gain = affine.gain * norm.weight.to(at::kDouble);
    affine.shift = -norm.running_mean.to(at::kDouble) * affine.gain;
    if (norm.bias.defined()) affine.shift = affine.shift + norm.bias.to(at::kDouble);
  });
  if (!known || !affine.gain.defined()) {
    throw ArgumentError("fold_batch_norm: " + path + ": expected a BatchNorm with running statistics, got " +
                        (known ? "one without" : place.module->name()));
  }
  return affine;
}

/// gain as a factor of the weight: dimension 0 are the output channels, or dimension 1 of each group of a
/// transposed convolution.
template <class Layer>
at::Tensor scaled(const Layer& layer, const at::Tensor& gain) {
  const at::Tensor weight = layer.weight.to(at::kDouble);
  if constexpr (requires { layer.options.transposed(); }) {
    if (layer.options.transposed()) {
      const int64_t groups = layer.options.groups();
      const at::Tensor grouped = weight.reshape({groups, weight.size(0) / groups, weight.size(1), -1});
      return (grouped * gain.view({groups, 1, weight.size(1), 1})).view_as(weight);
    }
  }
  std::vector<int64_t> channels(static_cast<size_t>(weight.dim()), 1);
  channels[0] = gain.numel();
  return weight * gain.view(channels);
}

template <class Layer>
int64_t output_channels(const Layer& layer) {
  if constexpr (requires { layer.options.out_channels(); }) {
    return layer.options.out_channels();
  } else {
    return layer.options.out_features();
  }
}

template <class Layer>
void fold_into(Layer& layer, const Affine& affine, const std::string& path) {
  if (output_channels(layer) != affine.gain.numel()) {
    throw ArgumentError("fold_batch_norm: " + path + ": expected a layer with the BatchNorm's " +
                        std::to_string(affine.gain.numel()) + " channels, got " +
                        std::to_string(output_channels(layer)));
  }
  at::Tensor shift = affine.shift;
  if (layer.bias.defined()) shift = shift + layer.bias.to(at::kDouble) * affine.gain;
  layer.weight.copy_(scaled(layer, affine.gain));
  if (layer.bias.defined()) {
    layer.bias.copy_(shift);
    return;
  }
  layer.bias =
      shift.to(layer.weight.options().requires_grad(false)).requires_grad_(layer.weight.requires_grad());
  detail::Registry::of(layer)["bias"] = layer.bias;
  layer.options.bias(true);  // `clone` builds the copy from the options
}

/// In evaluation mode, which the module can no longer leave: (x - 0) / sqrt(1 + 0) * 1 + 0.
void make_identity(const Place& place) {
  visit_batch_norm(*place.module, [](auto& norm) {
    norm.running_mean.zero_();
    norm.running_var.fill_(1);
    if (norm.weight.defined()) norm.weight.fill_(1).requires_grad_(false);
    if (norm.bias.defined()) norm.bias.zero_().requires_grad_(false);
    norm.options.eps(0.0);
    norm.eval();
  });
  place.parent->unregister_module(place.name);
}

}  // namespace

int64_t freeze_batch_norm(torch::nn::Module& module) {
  int64_t count = 0;
  module.apply(
      [&](Module& each) { count += visit_batch_norm(each, [](auto& norm) { norm.eval(); }) ? 1 : 0; });
  return count;
}

void fold_batch_norm(torch::nn::Module& root, const std::string& layer, const std::string& batch_norm) {
  using namespace torch::nn;
  const at::NoGradGuard no_grad;
  const Place norm = find(root, batch_norm), before = find(root, layer);
  const Affine affine = affine_of(norm, batch_norm);
  const bool known =
      visit_as<LinearImpl, Conv1dImpl, Conv2dImpl, Conv3dImpl, ConvTranspose1dImpl, ConvTranspose2dImpl,
               ConvTranspose3dImpl>(*before.module, [&](auto& typed) { fold_into(typed, affine, layer); });
  if (!known) {
    throw ArgumentError("fold_batch_norm: " + layer +
                        ": expected a torch::nn Linear, Conv or ConvTranspose, got " + before.module->name());
  }
  make_identity(norm);
}

}  // namespace qat
