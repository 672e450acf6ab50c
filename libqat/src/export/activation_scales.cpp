#include "export/activation_scales.hpp"

#include "export/coded_export.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

float number(const std::string& key, const at::Tensor& tensor) {
  if (tensor.numel() == 1) return tensor.to(at::kFloat).item<float>();
  throw ArgumentError("export_checkpoint: " + key + ": expected one number, got " +
                      std::to_string(tensor.numel()));
}

}  // namespace

bool is_cache_scale(std::string_view key) {
  return key.ends_with(kKeyScale) || key.ends_with(kValueScale);
}

bool is_activation_scale(std::string_view key) {
  return key.ends_with(kInputScale) || key.ends_with(kOutputScale) || is_cache_scale(key);
}

float activation_scale(const QuantizedCheckpoint& checkpoint, const HfTensor& planned, const char* part) {
  for (const std::string& weight : {planned.key, planned.holder}) {
    const std::string key = module_of(weight) + part;
    if (const auto found = checkpoint.floats.find(key); found != checkpoint.floats.end()) {
      return number(key, found->second);
    }
  }
  return 0.0F;
}

ActivationScaleMap planned_scales(const QuantizedCheckpoint& checkpoint, const std::vector<HfTensor>& plan,
                                  bool caches) {
  ActivationScaleMap scales;
  const auto add = [&](const std::string& key, float scale) {
    if (scale != 0.0F) scales[key] = scale;
  };
  for (const CodedModule& module : coded_modules(checkpoint, plan)) {
    if (module.planned->embedding) continue;
    for (const char* part : {kInputScale, kOutputScale}) {
      add(module.name + part, activation_scale(checkpoint, *module.planned, part));
    }
  }
  for (const auto& [key, tensor] : checkpoint.floats) {
    if (caches && is_cache_scale(key)) add(key, number(key, tensor));
  }
  return scales;
}

}  // namespace qat
