#include "qat/checkpoint/checkpoint.hpp"

#include <utility>

#include "check.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "qat/ops/fake_quantize.hpp"
#include "qat/ops/quantize.hpp"

namespace qat {
namespace {

/// A copy on the CPU that no later step of training reaches.
at::Tensor copied(const at::Tensor& tensor) {
  const at::Tensor detached = tensor.detach();
  return detached.is_cpu() ? detached.clone(at::MemoryFormat::Contiguous) : detached.cpu().contiguous();
}

at::Tensor rounded(const Latent& latent) {
  const at::Tensor value = ops::fake_quantize(latent.value.detach(), latent.scheme.weight, {}, latent.key);
  const bool half = grid::find(latent.scheme.weight).info().dtype == grid::DType::kF16;
  return value.to(half ? at::kHalf : at::kBFloat16);
}

at::Tensor float_weight(const at::Tensor& tensor) {
  return tensor.is_floating_point() ? tensor.to(at::kFloat) : tensor;
}

}  // namespace

QuantizedTensor quantize_tensor(const std::string& key, const at::Tensor& latent, const Scheme& scheme,
                                ScaleRule scale, const at::Tensor& scales) {
  auto [codes, stored] = ops::quantize(latent.detach(), scheme.weight, scale, key, scales);
  return {scheme, latent.sizes().vec(), codes.cpu(), stored.cpu()};
}

at::Tensor dequantize_tensor(const std::string& key, const QuantizedTensor& tensor) {
  return ops::dequantize(tensor.codes, tensor.scales, tensor.scheme.weight, key).reshape(tensor.shape);
}

QuantizedCheckpoint freeze_tensors(const std::vector<Latent>& tensors,
                                   std::map<std::string, std::string> aliases, std::string config,
                                   std::string tokenizer, std::string policy) {
  QuantizedCheckpoint checkpoint;
  checkpoint.config = std::move(config);
  checkpoint.tokenizer = std::move(tokenizer);
  checkpoint.policy = std::move(policy);
  checkpoint.aliases = std::move(aliases);
  const checkpoint::Subject subject{"freeze: ", false};
  for (const Latent& latent : tensors) {
    const std::string& key = latent.key;
    if (checkpoint.quantized.contains(key) || checkpoint.floats.contains(key)) {
      subject.fail(key, "each tensor once", "it twice");
    }
    if (!latent.value.defined()) subject.fail(key, "a tensor", "none");
    if (!grid::find(latent.scheme.weight).info().is_float) {
      checkpoint.quantized[key] =
          quantize_tensor(key, latent.value, latent.scheme, latent.scale, latent.scales);
      if (!latent.shape.empty()) checkpoint.quantized[key].shape = latent.shape;
    } else {
      const at::Tensor value = latent.scheme == Scheme{} ? copied(latent.value) : rounded(latent);
      checkpoint.floats[key] = latent.shape.empty() ? value : value.view(latent.shape);
    }
  }
  checkpoint::check(subject, checkpoint);
  return checkpoint;
}

at::Tensor weight_of(const QuantizedCheckpoint& checkpoint, const std::string& key) {
  const auto alias = checkpoint.aliases.find(key);
  const std::string& target = alias == checkpoint.aliases.end() ? key : alias->second;
  if (const auto found = checkpoint.quantized.find(target); found != checkpoint.quantized.end()) {
    return dequantize_tensor(target, found->second);
  }
  if (const auto found = checkpoint.floats.find(target); found != checkpoint.floats.end()) {
    return float_weight(found->second);
  }
  throw ArgumentError("weight_of: " + key + ": expected a tensor of the checkpoint, got none of this name");
}

std::vector<NamedTensor> dequantize(const QuantizedCheckpoint& checkpoint) {
  std::map<std::string, at::Tensor> weights;
  for (const auto& [key, tensor] : checkpoint.quantized) weights[key] = dequantize_tensor(key, tensor);
  for (const auto& [key, tensor] : checkpoint.floats) weights[key] = float_weight(tensor);
  for (const auto& [key, target] : checkpoint.aliases) {
    const auto found = weights.find(target);
    weights[key] = found != weights.end() ? found->second : weight_of(checkpoint, key);
  }
  std::vector<NamedTensor> named;
  for (auto& [key, tensor] : weights) named.push_back({key, std::move(tensor)});
  return named;
}

}  // namespace qat
