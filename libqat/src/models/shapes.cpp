#include "qat/models/shapes.hpp"

#include <map>

#include "qat/nn/embedding.hpp"
#include "qat/nn/experts.hpp"
#include "qat/nn/linear.hpp"
#include "qat/nn/without_initialization.hpp"

namespace qat::models {
namespace {

/// The kinds of all weights that some layer multiplies with or looks up.
std::map<std::string, SlotKind> kinds_of(const Decoder& decoder) {
  std::map<std::string, SlotKind> kinds;
  for (const auto& item : decoder.named_modules()) {
    const std::string& path = item.key();
    const torch::nn::Module& module = *item.value();
    if (dynamic_cast<const nn::LinearImpl*>(&module) != nullptr) {
      kinds[path + ".weight"] = SlotKind::kLinear;
    } else if (dynamic_cast<const nn::EmbeddingImpl*>(&module) != nullptr) {
      kinds[path + ".weight"] = SlotKind::kEmbedding;
    } else if (dynamic_cast<const nn::ExpertsImpl*>(&module) != nullptr) {
      kinds[path + ".gate_up_proj"] = kinds[path + ".down_proj"] = SlotKind::kLinear;
    }
  }
  return kinds;
}

}  // namespace

std::shared_ptr<Decoder> decoder_without_memory(const DecoderConfig& config) {
  const nn::WithoutMemory shapes_only;
  return std::make_shared<Decoder>(config);
}

std::vector<TensorShape> parameter_shapes(const DecoderConfig& config) {
  const auto decoder = decoder_without_memory(config);
  const auto kinds = kinds_of(*decoder);
  std::vector<TensorShape> shapes;
  for (const auto& item : decoder->named_parameters()) {
    const auto kind = kinds.find(item.key());
    shapes.push_back({item.key(), item.value().sizes().vec(),
                      kind == kinds.end() ? SlotKind::kOther : kind->second, false});
  }
  for (const auto& item : decoder->named_buffers()) {
    shapes.push_back({item.key(), item.value().sizes().vec(), SlotKind::kOther, true});
  }
  return shapes;
}

}  // namespace qat::models
