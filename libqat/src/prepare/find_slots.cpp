// The slots of a module tree, and which of them are one tensor.

#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "prepare/slots.hpp"
#include "qat/core/error.hpp"
#include "qat/nn/embedding.hpp"
#include "qat/nn/experts.hpp"
#include "qat/nn/linear.hpp"

namespace qat {
namespace {

using torch::nn::Module;
using TensorSet = std::unordered_set<const void*>;

const void* identity(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl();
}

/// A layer that reads its public member `weight` in forward.
template <class Layer>
Slot member_slot(Layer* layer, SlotKind kind) {
  return {"", kind, [layer] { return layer->weight; },
          [layer](const at::Tensor& value) { layer->weight = value; }, nullptr};
}

/// A layer that calls the operators with its own quantizer.
template <class Layer>
Slot bound_slot(Layer* layer, SlotKind kind) {
  return {"", kind, [layer] { return layer->weight; }, nullptr,
          [layer](std::shared_ptr<Quantizer> quantizer) { layer->quantizer = std::move(quantizer); }};
}

Slot embedding_slot(torch::nn::EmbeddingImpl* layer) {
  Slot slot = member_slot(layer, SlotKind::kEmbedding);
  slot.set = [layer](const at::Tensor& value) {
    if (layer->options.max_norm()) {
      throw UnsupportedError(
          "prepare: embedding: expected no max_norm, got one: it would renormalise w_hat, not the latent");
    }
    layer->weight = value;
  };
  return slot;
}

template <class... Layers>
bool conv_slot(Module& module, Slot& slot) {
  const auto try_one = [&](auto* layer) {
    if (layer != nullptr) slot = member_slot(layer, SlotKind::kConv);
    return layer != nullptr;
  };
  return (try_one(dynamic_cast<Layers*>(&module)) || ...);
}

/// The slots of a stack of experts.
std::vector<Slot> expert_slots(qat::nn::ExpertsImpl* experts) {
  const auto stack = [](at::Tensor& weights, std::shared_ptr<Quantizer>& place) {
    Slot slot{"", SlotKind::kLinear, [&weights] { return weights; }, nullptr,
              [&place](std::shared_ptr<Quantizer> quantizer) { place = std::move(quantizer); }};
    slot.row = weights.size(2);
    return slot;
  };
  std::vector<Slot> slots{stack(experts->gate_up_proj, experts->gate_up_quantizer),
                          stack(experts->down_proj, experts->down_quantizer)};
  slots[0].name = "gate_up_proj";
  slots[1].name = "down_proj";
  return slots;
}

/// The slot of one layer; false when the module is no layer with one quantizable weight.
bool slot_of(Module& module, Slot& slot) {
  using namespace torch::nn;
  if (auto* linear = dynamic_cast<LinearImpl*>(&module)) {
    slot = member_slot(linear, SlotKind::kLinear);
  } else if (auto* embedding = dynamic_cast<EmbeddingImpl*>(&module)) {
    slot = embedding_slot(embedding);
  } else if (auto* quantized = dynamic_cast<qat::nn::LinearImpl*>(&module)) {
    slot = bound_slot(quantized, SlotKind::kLinear);
  } else if (auto* table = dynamic_cast<qat::nn::EmbeddingImpl*>(&module)) {
    slot = bound_slot(table, SlotKind::kEmbedding);
  } else {
    return conv_slot<Conv1dImpl, Conv2dImpl, Conv3dImpl, ConvTranspose1dImpl, ConvTranspose2dImpl,
                     ConvTranspose3dImpl>(module, slot);
  }
  return true;
}

using detail::Registry;

/// A weight found in the tree: its module, and its name there ("weight").
struct Found {
  Module* module;
  std::string member;
  Slot slot;
};

/// The slots of the module itself, each named as the module's registry does.
std::vector<Slot> slots_of(Module& module) {
  if (auto* experts = dynamic_cast<qat::nn::ExpertsImpl*>(&module)) return expert_slots(experts);
  Slot slot;
  if (!slot_of(module, slot)) return {};
  slot.name = "weight";
  return {slot};
}

void collect(Module& module, const std::string& path, std::vector<Found>& found) {
  for (Slot& slot : slots_of(module)) {
    const std::string member = slot.name;
    if (!path.empty()) slot.name = path + "." + member;
    found.push_back({&module, member, std::move(slot)});
  }
  for (const auto& child : module.named_children()) {
    collect(*child.value(), path.empty() ? child.key() : path + "." + child.key(), found);
  }
}

TensorSet registered_in(const Module& module) {
  TensorSet registered;
  for (const at::Tensor& parameter : module.parameters()) registered.insert(identity(parameter));
  return registered;
}

/// Removes the layer's registration of a tensor that its forward no longer reads, if the one it reads is
/// tied.
void drop_dead(const Found& layer, const TensorSet& registered) {
  const at::Tensor member = layer.slot.get();
  auto& parameters = Registry::of(*layer.module);
  const at::Tensor* parameter = parameters.find(layer.member);
  if (parameter != nullptr && parameter->is_same(member)) return;
  if (!registered.contains(identity(member))) {
    throw ArgumentError(
        "prepare: " + layer.slot.name +
        ": expected the layer's member to be a registered parameter, its own or a tied one, got "
        "a tensor that no module registers: no optimizer would reach it");
  }
  if (parameter != nullptr) parameters.erase(layer.member);
}

/// Makes the registry say what forward reads, each tensor once.
void adopt_members(Module& root, const std::vector<Found>& layers) {
  TensorSet registered = registered_in(root);
  for (const Found& layer : layers) drop_dead(layer, registered);
  registered = registered_in(root);
  // Two layers may have exchanged their tensors: then both registrations went, and each takes its new one.
  for (const Found& layer : layers) {
    const at::Tensor member = layer.slot.get();
    if (registered.insert(identity(member)).second) Registry::of(*layer.module).insert(layer.member, member);
  }
}

void check_complete(const Slot& slot) {
  if (!slot.get || (!slot.set && !slot.bind)) {
    throw ArgumentError("prepare: " + slot.name +
                        ": expected a slot with `get`, and with `set` or `bind`, got less");
  }
  if (!slot.get().defined()) {
    throw ArgumentError("prepare: " + slot.name + ": expected a weight, got none");
  }
}

/// Whatever is done to `kept` also reaches `other`, which holds the same tensor.
void tie(Slot& kept, const Slot& other) {
  kept.aliases.push_back(other.name);
  kept.aliases.insert(kept.aliases.end(), other.aliases.begin(), other.aliases.end());
  if (other.set) {
    kept.set = [one = kept.set, two = other.set](const at::Tensor& value) {
      if (one) one(value);
      two(value);
    };
  }
  if (other.bind) {
    kept.bind = [one = kept.bind, two = other.bind](const std::shared_ptr<Quantizer>& quantizer) {
      if (one) one(quantizer);
      two(quantizer);
    };
  }
}

}  // namespace

std::vector<Slot> detail::merged(std::vector<Slot> slots) {
  std::vector<Slot> result;
  std::unordered_map<const void*, size_t> first;
  std::unordered_set<std::string> names;
  for (Slot& slot : slots) {
    check_complete(slot);
    if (!names.insert(slot.name).second) {
      throw ArgumentError("prepare: " + slot.name + ": expected each slot name once, got it twice");
    }
    const auto [place, is_new] = first.emplace(identity(slot.get()), result.size());
    if (is_new) {
      result.push_back(std::move(slot));
    } else {
      tie(result[place->second], slot);
    }
  }
  return result;
}

std::vector<Slot> find_slots(torch::nn::Module& module) {
  std::vector<Found> layers;
  collect(module, "", layers);
  for (Found& layer : layers) {
    check_complete(layer.slot);
    detail::expect_no_scope("prepare", layer.slot);
  }
  adopt_members(module, layers);
  std::vector<Slot> slots;
  for (Found& layer : layers) slots.push_back(std::move(layer.slot));
  return detail::merged(std::move(slots));
}

}  // namespace qat
