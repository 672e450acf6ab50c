#include "qat/prepare/outline.hpp"

#include <ATen/ops/empty.h>

#include <utility>

#include "qat/checkpoint/outline.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"

namespace qat {
namespace {

/// As the policy sees it: a stack of matrices by its rows.
Target as_slot(Target tensor) {
  constexpr std::size_t kStack = 3;
  std::vector<int64_t>& shape = tensor.shape;
  if (tensor.kind == SlotKind::kLinear && shape.size() == kStack) shape = {shape[0] * shape[1], shape[2]};
  return tensor;
}

at::ScalarType type_of(const Scheme& scheme, at::ScalarType floats) {
  if (scheme == Scheme{}) return floats;
  return grid::find(scheme.weight).info().dtype == grid::DType::kF16 ? at::kHalf : at::kBFloat16;
}

}  // namespace

QuantizedCheckpoint outline(const std::vector<Target>& tensors, const Policy& policy, at::ScalarType floats,
                            std::string config) {
  std::vector<Target> slots;
  for (const Target& tensor : tensors) {
    if (tensor.kind != SlotKind::kOther) slots.push_back(as_slot(tensor));
  }
  const std::vector<Scheme> schemes = policy.resolve(slots);
  QuantizedCheckpoint checkpoint;
  checkpoint.config = std::move(config);
  checkpoint.policy = policy.to_json();
  auto scheme = schemes.begin();
  for (const Target& tensor : tensors) {
    const std::string& key = tensor.name;
    if (checkpoint.quantized.contains(key) || checkpoint.floats.contains(key)) {
      throw ArgumentError("outline: " + key + ": expected each tensor once, got it twice");
    }
    const Scheme own = tensor.kind == SlotKind::kOther ? Scheme{} : *scheme++;
    if (grid::find(own.weight).info().is_float) {
      const auto options = at::TensorOptions().device(at::kMeta).dtype(type_of(own, floats));
      checkpoint.floats[key] = at::empty(tensor.shape, options);
    } else {
      checkpoint.quantized[key] = outline_tensor(key, tensor.shape, own);
    }
  }
  return checkpoint;
}

}  // namespace qat
