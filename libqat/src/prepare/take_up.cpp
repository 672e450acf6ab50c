#include "qat/prepare/take_up.hpp"

#include <string>

#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "qat/prepare/state.hpp"

namespace qat {
namespace {

const QuantizedTensor* find(const QuantizedCheckpoint& checkpoint, const Slot& slot) {
  const auto alias = checkpoint.aliases.find(slot.name);
  const auto found = checkpoint.quantized.find(alias == checkpoint.aliases.end() ? slot.name : alias->second);
  return found == checkpoint.quantized.end() ? nullptr : &found->second;
}

/// The slot's tensor of the checkpoint; null when the model keeps it float.
const QuantizedTensor* checked(const QuantizedCheckpoint& checkpoint, const Slot& slot,
                               const Quantizer* quantizer) {
  const QuantizedTensor* tensor = find(checkpoint, slot);
  if (quantizer == nullptr || grid::find(quantizer->scheme().weight).info().is_float) return nullptr;
  const auto fail = [&](const std::string& expected, const std::string& got) {
    throw ArgumentError("take_up: " + slot.name + ": expected " + expected + ", got " + got);
  };
  const std::string& wanted = quantizer->scheme().weight;
  if (tensor == nullptr) fail("a tensor on " + wanted, "none in the checkpoint");
  if (tensor->scheme.weight != wanted) fail("a tensor on " + wanted, "one on " + tensor->scheme.weight);
  if (!quantizer->learned() || !quantizer->training_grid().empty()) {
    fail("a policy with learned scales, which hold the checkpoint's",
         "scale \"" + std::string(to_string(quantizer->estimator().scale)) + "\"");
  }
  return tensor;
}

/// The scale of that name. Those of a table that is also the head may go by the head's usual name.
const at::Tensor* scale_of(const QuantizedCheckpoint& checkpoint, const std::string& name) {
  const std::string part = name.substr(name.rfind('.'));
  for (const std::string& key : {name, "lm_head" + part}) {
    const bool table = name.ends_with("embed_tokens" + part);
    const auto found = checkpoint.floats.find(key);
    if ((key == name || table) && found != checkpoint.floats.end()) return &found->second;
  }
  return nullptr;
}

bool is_scale(const PreparedModel& model, const std::string& key) {
  for (const auto& activation : model.activations()) {
    if (activation->name() == key) return true;
  }
  for (const char* part :
       {".input_activation_scale", ".output_activation_scale", ".k_cache_scale", ".v_cache_scale"}) {
    if (key.ends_with(part)) return true;
  }
  return false;
}

}  // namespace

void take_up(PreparedModel& model, const QuantizedCheckpoint& checkpoint) {
  std::vector<const QuantizedTensor*> tensors;
  for (size_t i = 0; i < model.slots().size(); ++i) {
    tensors.push_back(checked(checkpoint, model.slots()[i], model.quantizers()[i].get()));
  }
  QuantizedCheckpoint weights = checkpoint;
  std::erase_if(weights.floats, [&](const auto& entry) { return is_scale(model, entry.first); });
  load_state(model.module(), weights);
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i] == nullptr) continue;
    model.quantizers()[i]->set_field_scales(tensors[i]->scales.to(model.slots()[i].get().device()));
  }
  for (const auto& activation : model.activations()) {
    const at::Tensor* const scale = scale_of(checkpoint, activation->name());
    if (activation->has_scale() && scale != nullptr) {
      activation->set_scale(scale->to(at::kFloat).item<float>());
    }
  }
}

}  // namespace qat
