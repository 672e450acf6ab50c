#include "export/expert_stacks.hpp"

#include <algorithm>
#include <optional>
#include <set>

#include "qat/grid/grid.hpp"

namespace qat {
namespace {

constexpr std::string_view kExperts = ".experts.";
constexpr std::string_view kGate = "gate_proj", kUp = "up_proj", kDown = "down_proj";
constexpr std::string_view kGateUp = "gate_up_proj";

/// "model.layers.0.experts.gate_up_proj" -> "model.layers.0.experts." and "gate_up_proj"; "" for others.
std::pair<std::string, std::string> take_apart(std::string_view key) {
  const std::size_t dot = key.rfind('.') + 1;
  const std::string_view parent = key.substr(0, dot), matrix = key.substr(dot);
  const bool known = matrix == kGateUp || matrix == kUp || matrix == kDown;
  if (!known || !parent.ends_with(kExperts)) return {};
  return {std::string(parent), std::string(matrix)};
}

struct LayerName {
  std::string parent;  ///< "model.layers.0.experts."
  std::string expert, matrix;
};

/// "model.layers.0.experts.3.up_proj" taken apart.
std::optional<LayerName> parse_layer(std::string_view name) {
  const std::size_t last = name.rfind('.');
  if (last == std::string_view::npos || last == 0) return std::nullopt;
  const std::size_t number = name.rfind('.', last - 1) + 1;
  const std::string_view parent = name.substr(0, number), expert = name.substr(number, last - number);
  const std::string_view matrix = name.substr(last + 1);
  const bool digits = !expert.empty() && expert.find_first_not_of("0123456789") == std::string_view::npos;
  const bool known = matrix == kGate || matrix == kUp || matrix == kDown;
  if (!digits || !known || !parent.ends_with(kExperts)) return std::nullopt;
  return LayerName{std::string(parent), std::string(expert), std::string(matrix)};
}

/// The matrices of an expert whose rows follow each other in the stack.
std::vector<std::string_view> matrices_of(std::string_view stack) {
  if (stack == kGateUp) return {kGate, kUp};
  return {stack};
}

std::string layer_name(const std::string& parent, int64_t expert, std::string_view matrix) {
  return parent + std::to_string(expert) + "." + std::string(matrix);
}

}  // namespace

bool is_expert_stack(const HfTensor& tensor) {
  const auto [parent, matrix] = take_apart(tensor.key);
  if (parent.empty() || tensor.shape.size() != 3) return false;
  return tensor.shape[0] > 0 && tensor.shape[1] % static_cast<int64_t>(matrices_of(matrix).size()) == 0;
}

std::vector<ExpertLayer> expert_layers(const HfTensor& stack) {
  const auto [parent, matrix] = take_apart(stack.key);
  const std::vector<std::string_view> matrices = matrices_of(matrix);
  const int64_t rows = stack.shape[1] / static_cast<int64_t>(matrices.size());
  std::vector<ExpertLayer> layers;
  int64_t first = 0;
  for (int64_t expert = 0; expert < stack.shape[0]; ++expert) {
    for (const std::string_view one : matrices) {
      layers.push_back({layer_name(parent, expert, one), first, rows});
      first += rows;
    }
  }
  return layers;
}

std::map<std::string, std::vector<std::string>> expert_stacks(const std::vector<std::string>& layers) {
  struct Found {
    std::set<std::string> experts, matrices;
  };
  std::map<std::string, Found> parents;
  for (const std::string& name : layers) {
    if (const auto layer = parse_layer(name)) {
      parents[layer->parent].experts.insert(layer->expert);
      parents[layer->parent].matrices.insert(layer->matrix);
    }
  }
  std::map<std::string, std::vector<std::string>> stacks;
  for (const auto& [parent, found] : parents) {
    const bool gated = found.matrices.contains(std::string(kGate));
    for (const std::string_view stack : {gated ? kGateUp : kUp, kDown}) {
      if (stack != kGateUp && !found.matrices.contains(std::string(stack))) continue;
      std::vector<std::string>& needed = stacks[parent + std::string(stack)];
      for (int64_t expert = 0; expert < static_cast<int64_t>(found.experts.size()); ++expert) {
        for (const std::string_view one : matrices_of(stack)) {
          needed.push_back(layer_name(parent, expert, one));
        }
      }
    }
  }
  return stacks;
}

bool has_row_scales(const QuantizedTensor& stack) {
  const int64_t block = grid::find(stack.scheme.weight).info().block, width = stack.shape.back();
  if (block > 0) return width % block == 0;
  return block == grid::kWholeRow && stack.codes.size(-1) == width;
}

QuantizedTensor layer_of(const QuantizedTensor& stack, const ExpertLayer& layer) {
  const int64_t width = stack.shape.back(), rows = stack.codes.numel() / width;
  const int64_t params = stack.scales.size(-1);
  return {stack.scheme,
          {layer.rows, width},
          stack.codes.reshape({rows, width}).narrow(0, layer.first, layer.rows),
          stack.scales.reshape({rows, -1, params}).narrow(0, layer.first, layer.rows)};
}

}  // namespace qat
