#include "qat/prepare/state.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <sstream>
#include <unordered_map>
#include <vector>

#include "checkpoint/dtype.hpp"
#include "qat/core/error.hpp"
#include "qat/io/safetensors.hpp"

namespace qat {
namespace {

/// A tensor that a file or a checkpoint offers.
struct Offer {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  std::function<at::Tensor()> read;
};
using Offers = std::map<std::string, Offer>;

std::string describe(at::ScalarType dtype, at::IntArrayRef shape) {
  std::ostringstream text;
  text << c10::toString(dtype) << shape;
  return text.str();
}

/// Parameters, then buffers, in the module's order.
std::vector<NamedTensor> members(const torch::nn::Module& module) {
  std::vector<NamedTensor> all;
  for (const auto& entry : module.named_parameters()) all.push_back({entry.key(), entry.value()});
  for (const auto& entry : module.named_buffers()) {
    if (entry.value().defined()) all.push_back({entry.key(), entry.value()});
  }
  return all;
}

/// The names under which each tensor is registered, in the module's order.
std::vector<std::vector<NamedTensor>> distinct(const std::vector<NamedTensor>& all) {
  std::vector<std::vector<NamedTensor>> groups;
  std::unordered_map<const void*, size_t> first;
  for (const NamedTensor& member : all) {
    const auto [place, is_new] = first.emplace(member.value.unsafeGetTensorImpl(), groups.size());
    if (is_new) groups.emplace_back();
    groups[place->second].push_back(member);
  }
  return groups;
}

bool fits(const Offer& offer, const at::Tensor& member) {
  const bool floats = c10::isFloatingType(offer.dtype) && c10::isFloatingType(member.scalar_type());
  return at::IntArrayRef(offer.shape) == member.sizes() && (floats || offer.dtype == member.scalar_type());
}

/// Pairs every tensor of the module with its offer. What does not fit is described in `problems`.
std::vector<std::pair<at::Tensor, const Offer*>> match(const torch::nn::Module& module, const Offers& offers,
                                                       std::string& problems) {
  std::vector<std::pair<at::Tensor, const Offer*>> pairs;
  std::map<std::string, bool> extra;
  for (const auto& [name, offer] : offers) extra[name] = true;
  for (const auto& group : distinct(members(module))) {
    const Offer* chosen = nullptr;
    for (const NamedTensor& member : group) {
      const auto found = offers.find(member.name);
      if (found == offers.end()) continue;
      extra[member.name] = false;
      if (chosen == nullptr) chosen = &found->second;
    }
    const NamedTensor& member = group.front();
    const std::string wanted = describe(member.value.scalar_type(), member.value.sizes());
    if (chosen == nullptr) {
      problems += "\n  " + member.name + ": expected " + wanted + ", got none";
    } else if (!fits(*chosen, member.value)) {
      problems +=
          "\n  " + member.name + ": expected " + wanted + ", got " + describe(chosen->dtype, chosen->shape);
    }
    pairs.emplace_back(member.value, chosen);
  }
  for (const auto& [name, unclaimed] : extra) {
    if (unclaimed) problems += "\n  " + name + ": expected a tensor of the module, got another name";
  }
  return pairs;
}

void copy_all(const std::vector<std::pair<at::Tensor, const Offer*>>& pairs) {
  const at::NoGradGuard no_grad;
  for (const auto& [member, offer] : pairs) member.copy_(offer->read());
}

at::Tensor read(const io::SafetensorsTensor& stored, at::ScalarType dtype) {
  at::Tensor tensor = at::empty(stored.shape, dtype);
  if (!stored.data.empty()) std::memcpy(tensor.mutable_data_ptr(), stored.data.data(), stored.data.size());
  return tensor;
}

Offers offers_of(const io::SafetensorsDirectory& files) {
  Offers offers;
  for (const std::string& name : files.names()) {
    const io::SafetensorsTensor* tensor = files.find(name);
    const auto dtype = checkpoint::tensor_dtype(tensor->dtype);
    if (!dtype) {
      throw FileError("load_state: " + files.path().string() + ": " + name +
                      ": expected a tensor of floats, integers or bools, got " +
                      std::string(io::to_string(tensor->dtype)));
    }
    offers[name] = {*dtype, tensor->shape, [tensor, dtype] { return read(*tensor, *dtype); }};
  }
  return offers;
}

/// Aliases that the module does not have are left out: they name a tensor that it has by another name.
Offers offers_of(const QuantizedCheckpoint& checkpoint, const torch::nn::Module& module) {
  Offers offers;
  for (const auto& [name, tensor] : checkpoint.quantized) {
    offers[name] = {at::kFloat, tensor.shape, [&, key = name] { return weight_of(checkpoint, key); }};
  }
  for (const auto& [name, tensor] : checkpoint.floats) {
    offers[name] = {tensor.scalar_type(), tensor.sizes().vec(), [value = tensor] { return value; }};
  }
  for (const NamedTensor& member : members(module)) {
    const auto alias = checkpoint.aliases.find(member.name);
    if (alias != checkpoint.aliases.end()) offers[member.name] = offers.at(alias->second);
  }
  return offers;
}

template <class Failure>
void load_from(torch::nn::Module& module, const Offers& offers, const std::string& subject) {
  std::string problems;
  const auto pairs = match(module, offers, problems);
  if (!problems.empty()) throw Failure(subject + "expected the module's tensors, got" + problems);
  copy_all(pairs);
}

bool is_checkpoint(const io::SafetensorsDirectory& files) {
  return files.files().size() == 1 && files.files().front().metadata().contains("libqat.format");
}

}  // namespace

void load_state(torch::nn::Module& module, const QuantizedCheckpoint& checkpoint) {
  load_from<ArgumentError>(module, offers_of(checkpoint, module), "load_state: checkpoint: ");
}

void load_state(torch::nn::Module& module, const std::string& path) {
  const io::SafetensorsDirectory files(path);
  const std::string subject = "load_state: " + path + ": ";
  if (is_checkpoint(files)) {
    const QuantizedCheckpoint checkpoint = load(path);
    load_from<FileError>(module, offers_of(checkpoint, module), subject);
  } else {
    load_from<FileError>(module, offers_of(files), subject);
  }
}

void save_state(const torch::nn::Module& module, const std::string& path) {
  std::vector<at::Tensor> kept;
  std::vector<io::SafetensorsEntry> entries;
  for (const auto& group : distinct(members(module))) {
    const NamedTensor& member = group.front();
    const auto dtype = checkpoint::file_dtype(member.value.scalar_type());
    if (!dtype) {
      throw ArgumentError("save_state: " + member.name + ": expected floats, integers or bools, got " +
                          c10::toString(member.value.scalar_type()));
    }
    kept.push_back(member.value.detach().to(at::kCPU).contiguous());
    entries.push_back({member.name, *dtype, member.value.sizes().vec(), {}});
    entries.back().data =
        std::span(static_cast<const std::byte*>(kept.back().const_data_ptr()), kept.back().nbytes());
  }
  io::write_safetensors(path, entries);
}

}  // namespace qat
