#include "qat/prepare/prepare.hpp"

#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "prepare/slots.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "qat/nn/kv_slot.hpp"

namespace qat {
namespace {

std::vector<Target> targets_of(const std::vector<Slot>& slots) {
  std::vector<Target> targets;
  for (const Slot& slot : slots) {
    const at::Tensor latent = slot.get();
    const bool stack = slot.row != 0;
    targets.push_back(
        {slot.name, slot.kind,
         stack ? std::vector<int64_t>{latent.numel() / slot.row, slot.row} : latent.sizes().vec()});
  }
  return targets;
}

/// A table that only tokens are looked up in has no product to round; a stack of experts has many.
void check_activations(const Slot& slot, const Activations& activations) {
  if (!activations.any()) return;
  const bool looked_up = slot.kind == SlotKind::kEmbedding && slot.aliases.empty();
  if ((!slot.set || looked_up) && slot.row == 0) return;
  throw UnsupportedError("prepare: " + slot.name +
                         ": expected a layer that rounds its activations itself (qat::nn::Linear) for input "
                         "and output, got " +
                         (slot.row != 0 ? "a stack of experts" : "one that reads a weight"));
}

std::shared_ptr<Quantizer> quantizer_for(const Slot& slot, const Scheme& scheme, const Estimator& estimator,
                                         const Activations& activations, const ActivationScales& rule) {
  if (scheme == Scheme{}) return nullptr;
  const at::Tensor latent = slot.get();
  if (latent.scalar_type() != at::kFloat) {
    throw ArgumentError("prepare: " + slot.name +
                        ": expected a float32 latent (others are too coarse to train), got " +
                        c10::toString(latent.scalar_type()));
  }
  // Refuses here, not in the first forward, what the layer cannot take; nothing changes.
  if (slot.set) slot.set(latent);
  if (slot.row != 0 && grid::find(scheme.weight).info().block == grid::kWholeTensor) {
    throw UnsupportedError("prepare: " + slot.name +
                           ": expected a grid with scales of rows for a stack of matrices, got " +
                           scheme.weight);
  }
  check_activations(slot, activations);
  auto quantizer = std::make_shared<Quantizer>(slot.name, scheme, estimator, slot.row);
  quantizer->add_activations(activations, rule, latent.device());
  quantizer->initialize_scales(latent);
  return quantizer;
}

/// What freezing and reports see: the scheme's grid, whatever forward uses at present.
Latent shipped(const Slot& slot, const Quantizer* quantizer) {
  if (quantizer == nullptr) return {slot.name, slot.get(), {}};
  const at::Tensor latent = slot.get(), matrix = quantizer->matrix(latent);
  const std::vector<int64_t> shape = slot.row == 0 ? std::vector<int64_t>() : latent.sizes().vec();
  const ScaleRule rule = quantizer->estimator().scale;
  // Learned scales of another grid say nothing about this one's: back on it, they would start as here.
  if (is_learned(rule) && !quantizer->training_grid().empty()) {
    Quantizer own(slot.name, quantizer->scheme(), quantizer->estimator(), slot.row);
    own.initialize_scales(latent);
    return shipped(slot, &own);
  }
  return {slot.name,
          matrix,
          quantizer->scheme(),
          is_learned(rule) ? ScaleRule::kLearned : rule,
          quantizer->field_scales(),
          shape};
}

}  // namespace

PreparedModel::PreparedModel(std::shared_ptr<torch::nn::Module> module, std::vector<Slot> slots,
                             const Policy& policy)
    : module_(std::move(module)), slots_(detail::merged(std::move(slots))), policy_(policy) {
  if (!module_) throw ArgumentError("prepare: module: expected a module, got none");
  for (const Slot& slot : slots_) detail::expect_no_scope("prepare", slot);
  const std::vector<Target> targets = targets_of(slots_);
  const std::vector<Scheme> schemes = policy_.resolve(targets);
  const std::vector<Estimator> estimators = policy_.estimators(targets);
  const std::vector<Activations> activations = policy_.activations(targets);
  for (size_t i = 0; i < slots_.size(); ++i) {
    quantizers_.push_back(
        quantizer_for(slots_[i], schemes[i], estimators[i], activations[i], policy_.activation_scales()));
    if (!quantizers_.back()) continue;
    for (const auto& activation : {quantizers_.back()->input(), quantizers_.back()->output()}) {
      if (activation) activations_.push_back(activation);
    }
  }
  bind_kv_cache();
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].bind) slots_[i].bind(quantizers_[i]);
  }
}

void PreparedModel::bind_kv_cache() {
  if (policy_.kv_cache().empty()) return;
  auto* const owner = dynamic_cast<nn::HasKvSlots*>(module_.get());
  if (owner == nullptr) {
    throw UnsupportedError(
        "prepare: kv_cache: expected a model that shows its keys and values (nn::HasKvSlots), got one that "
        "does not");
  }
  const std::vector<at::Tensor> parameters = module_->parameters();
  const at::Device device = parameters.empty() ? at::Device(at::kCPU) : parameters.front().device();
  for (const nn::KvSlot& slot : owner->kv_slots()) {
    std::vector<std::shared_ptr<ActivationQuantizer>> both;
    for (const char* part : {".k_cache_scale", ".v_cache_scale"}) {
      both.push_back(std::make_shared<ActivationQuantizer>(slot.name + part, policy_.kv_cache(),
                                                           policy_.activation_scales(), device));
      for (const std::string& alias : slot.aliases) shared_.emplace_back(alias + part, both.back());
      activations_.push_back(both.back());
    }
    slot.bind(both[0], both[1]);
  }
}

void PreparedModel::set_calibrating(bool calibrating) {
  for (const auto& activation : activations_) activation->set_calibrating(calibrating);
}

QuantizedScope PreparedModel::quantized() {
  return QuantizedScope(slots_, quantizers_);
}

void PreparedModel::set_enabled(bool enabled) {
  for (const auto& quantizer : quantizers_) {
    if (quantizer) quantizer->set_enabled(enabled);
  }
  for (const auto& activation : activations_) activation->set_enabled(enabled);
}

std::vector<NamedTensor> PreparedModel::scale_parameters() const {
  std::vector<NamedTensor> parameters;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!quantizers_[i] || !quantizers_[i]->scales().defined()) continue;
    parameters.push_back({slots_[i].name + "_scales", quantizers_[i]->scales()});
  }
  for (const auto& activation : activations_) {
    if (activation->learned()) parameters.push_back({activation->name(), activation->scale()});
  }
  return parameters;
}

void PreparedModel::initialize_scales(ScaleRule from) {
  for (size_t i = 0; i < slots_.size(); ++i) {
    detail::expect_no_scope("initialize_scales", slots_[i]);
    if (quantizers_[i]) quantizers_[i]->initialize_scales(slots_[i].get(), from);
  }
}

std::vector<TensorReport> PreparedModel::report() const {
  std::unordered_map<const void*, size_t> slot_of;
  for (size_t i = 0; i < slots_.size(); ++i) {
    detail::expect_no_scope("report", slots_[i]);
    slot_of[slots_[i].get().unsafeGetTensorImpl()] = i;
  }
  std::vector<TensorReport> lines;
  std::unordered_set<const void*> seen;
  const auto add_slot = [&](size_t i) {
    const Latent latent = shipped(slots_[i], quantizers_[i].get());
    lines.push_back(
        report_tensor(latent.key, slots_[i].kind, latent.value, latent.scheme, latent.scale, latent.scales));
    lines.back().shape = slots_[i].get().sizes().vec();
    const Quantizer* const quantizer = quantizers_[i].get();
    if (quantizer != nullptr && quantizer->input()) lines.back().input = quantizer->input()->format();
    if (quantizer != nullptr && quantizer->output()) lines.back().output = quantizer->output()->format();
  };
  for (const auto& parameter : module_->named_parameters()) {
    const void* identity = parameter.value().unsafeGetTensorImpl();
    if (!seen.insert(identity).second) continue;
    if (const auto slot = slot_of.find(identity); slot != slot_of.end()) {
      add_slot(slot->second);
    } else {
      lines.push_back(report_tensor(parameter.key(), SlotKind::kOther, parameter.value(), {}));
    }
  }
  // Slots of the user's own that hold a tensor which no module registers.
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!seen.contains(slots_[i].get().unsafeGetTensorImpl())) add_slot(i);
  }
  return lines;
}

void PreparedModel::add_activation_scales(std::vector<Latent>& tensors) const {
  const auto add = [&](const std::string& name, const ActivationQuantizer& activation) {
    if (activation.has_scale()) tensors.push_back({name, activation.scale().detach().reshape({}), {}});
  };
  for (const auto& activation : activations_) add(activation->name(), *activation);
  for (const auto& [name, activation] : shared_) add(name, *activation);
}

PreparedModel prepare(std::shared_ptr<torch::nn::Module> module, const Policy& policy,
                      std::vector<Slot> extra) {
  if (!module) throw ArgumentError("prepare: module: expected a module, got none");
  std::vector<Slot> slots = find_slots(*module);
  for (Slot& slot : extra) slots.push_back(std::move(slot));
  return PreparedModel(std::move(module), std::move(slots), policy);
}

QuantizedCheckpoint freeze(const PreparedModel& model, std::string config, std::string tokenizer) {
  std::vector<Latent> tensors;
  std::map<std::string, std::string> aliases;
  std::unordered_map<const void*, std::string> keys;
  for (size_t i = 0; i < model.slots().size(); ++i) {
    const Slot& slot = model.slots()[i];
    detail::expect_no_scope("freeze", slot);
    tensors.push_back(shipped(slot, model.quantizers()[i].get()));
    keys[slot.get().unsafeGetTensorImpl()] = slot.name;
    for (const std::string& alias : slot.aliases) aliases[alias] = slot.name;
  }
  const auto keep = [&](const std::string& name, const at::Tensor& tensor) {
    const auto [key, is_new] = keys.emplace(tensor.unsafeGetTensorImpl(), name);
    if (is_new) {
      tensors.push_back({name, tensor, {}});
    } else if (key->second != name) {
      aliases[name] = key->second;
    }
  };
  for (const auto& parameter : model.module().named_parameters()) keep(parameter.key(), parameter.value());
  for (const auto& buffer : model.module().named_buffers()) keep(buffer.key(), buffer.value());
  model.add_activation_scales(tensors);
  return freeze_tensors(tensors, std::move(aliases), std::move(config), std::move(tokenizer),
                        model.policy().to_json());
}

}  // namespace qat
