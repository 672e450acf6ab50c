#include "export/fitting.hpp"

#include <optional>
#include <utility>

#include "qat/checkpoint/convert.hpp"
#include "qat/checkpoint/outline.hpp"

namespace qat {
namespace {

/// The tensor on the first grid that holds it, or nothing and the reason.
std::optional<QuantizedTensor> place(const std::string& key, const QuantizedTensor& tensor,
                                     const Choice& choice, std::string& reason) {
  reason = choice.reason;
  if (choice.grids.empty()) return std::nullopt;
  if (tensor.codes.is_meta()) return outline_tensor(key, tensor.shape, {choice.grids.front()});
  std::vector<std::string> why;
  auto placed = convert_to_first(key, tensor, choice.grids, why);
  if (!placed) reason = why[choice.natural];
  return placed;
}

}  // namespace

Fitted fit(const QuantizedCheckpoint& checkpoint, const Choose& choose) {
  Fitted fitted{checkpoint, {}};
  for (auto& [key, tensor] : fitted.checkpoint.quantized) {
    const Choice choice = choose(tensor);
    if (choice.grids.size() == 1 && choice.grids.front() == tensor.scheme.weight) continue;
    std::string reason;
    if (auto placed = place(key, tensor, choice, reason)) {
      tensor = *std::move(placed);
    } else {
      fitted.obstacles.push_back({key, tensor.scheme.weight, reason});
    }
  }
  return fitted;
}

}  // namespace qat
