#include <memory>
#include <utility>

#include "export/activation_scales.hpp"
#include "qat/checkpoint/checkpoint.hpp"
#include "qat/core/error.hpp"
#include "qat/models/load.hpp"
#include "qat/nn/embedding.hpp"
#include "qat/nn/linear.hpp"
#include "stored_model.hpp"

namespace qat::models {
namespace {

/// Rounds activations at one place by a scale of the checkpoint.
class Rounding {
 public:
  explicit Rounding(const QuantizedCheckpoint& checkpoint) : checkpoint_(checkpoint) {}

  /// Null when the checkpoint has no scale of that name.
  std::shared_ptr<ActivationQuantizer> of(const std::string& name) const {
    const auto found = checkpoint_.floats.find(name);
    if (found == checkpoint_.floats.end()) return nullptr;
    auto rounding = std::make_shared<ActivationQuantizer>(name, std::string(kInt8TensorStatic),
                                                          ActivationScales{}, at::kCPU);
    rounding->set_scale(found->second.to(at::kFloat).item<float>());
    return rounding;
  }

  /// What rounds the inputs and outputs of a layer whose weight stays as it is; null when nothing does.
  std::shared_ptr<Quantizer> of_layer(const std::string& layer) const {
    const auto input = of(layer + kInputScale), output = of(layer + kOutputScale);
    if (!input && !output) return nullptr;
    auto quantizer = std::make_shared<Quantizer>(layer + ".weight", Scheme{}, Estimator{});
    const auto format = [](const auto& rounding) { return rounding ? rounding->format() : ""; };
    quantizer->add_activations({format(input), format(output)}, {}, at::kCPU);
    if (input) quantizer->input()->set_scale(input->scale().template item<float>());
    if (output) quantizer->output()->set_scale(output->scale().template item<float>());
    return quantizer;
  }

 private:
  const QuantizedCheckpoint& checkpoint_;
};

/// What ships is computed with rounded activations, too.
void round_activations(Decoder& decoder, const QuantizedCheckpoint& checkpoint) {
  const Rounding rounding(checkpoint);
  for (const auto& item : decoder.named_modules()) {
    if (auto* linear = dynamic_cast<nn::LinearImpl*>(item.value().get())) {
      linear->quantizer = rounding.of_layer(item.key());
    } else if (auto* table = dynamic_cast<nn::EmbeddingImpl*>(item.value().get())) {
      // Those of a tied head go by its name or by the table's.
      const bool head = decoder.config().tie_word_embeddings && item.key() == "model.embed_tokens";
      if (!head) continue;
      table->quantizer = rounding.of_layer("lm_head");
      if (!table->quantizer) table->quantizer = rounding.of_layer(item.key());
    }
  }
  for (const nn::KvSlot& slot : decoder.kv_slots()) {
    slot.bind(rounding.of(slot.name + kKeyScale), rounding.of(slot.name + kValueScale));
  }
}

}  // namespace

LoadedModel load_checkpoint(const std::string& path) {
  const auto checkpoint = std::make_shared<const QuantizedCheckpoint>(load(path));
  if (checkpoint->config.empty()) {
    throw FileError("load_checkpoint: " + path + ": expected the model's configuration, got none");
  }
  StoredModel stored{path, checkpoint->config, checkpoint->tokenizer, {}};
  const auto add = [&](const std::string& key, const std::vector<int64_t>& shape) {
    stored.tensors[key] = {shape, [checkpoint, key] { return weight_of(*checkpoint, key); }};
  };
  for (const auto& [key, tensor] : checkpoint->quantized) add(key, tensor.shape);
  for (const auto& [key, tensor] : checkpoint->floats) {
    if (!is_activation_scale(key)) add(key, tensor.sizes().vec());
  }
  for (const auto& [key, target] : checkpoint->aliases) {
    add(key, std::vector<int64_t>(stored.tensors.at(target).shape));  // `load` has checked the target
  }
  LoadedModel loaded = assemble("load_checkpoint", std::move(stored));
  round_activations(*loaded.decoder, *checkpoint);
  return loaded;
}

}  // namespace qat::models
