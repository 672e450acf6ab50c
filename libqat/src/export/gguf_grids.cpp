#include "export/gguf_grids.hpp"

#include <algorithm>

#include "export/comparison.hpp"
#include "qat/grid/ggml.hpp"

namespace qat {
namespace {

/// The nearest types for codes of that width, without and with an offset.
struct Nearest {
  int bits;
  const char* plain;
  const char* offset;
};

constexpr Nearest kNearest[] = {{1, "q1_0", "q4_1"}, {2, "q2_0", "q2_k"}, {3, "q3_k", "q4_1"},
                                {4, "q4_0", "q4_1"}, {5, "q5_0", "q5_1"}, {8, "q8_0", "q5_1"}};

bool has_offset(const grid::Info& info) {
  return std::any_of(info.fields.begin(), info.fields.end(), [](const grid::Field& field) {
    return field.name == "mins" || field.name == "biases" || field.name == "zero_points";
  });
}

std::vector<const grid::GgmlType*> types_by_size() {
  std::vector<const grid::GgmlType*> types;
  for (const std::string_view name : grid::names()) {
    const grid::GgmlType* type = grid::ggml_type_of_grid(name);
    if (type != nullptr && type->pack != nullptr) types.push_back(type);
  }
  std::stable_sort(types.begin(), types.end(), [](const grid::GgmlType* a, const grid::GgmlType* b) {
    return a->bytes * b->block < b->bytes * a->block;
  });
  return types;
}

}  // namespace

Choice gguf_grids(const QuantizedTensor& tensor) {
  const std::string& own = tensor.scheme.weight;
  const grid::Info& info = grid::find(own).info();
  const grid::GgmlType* type = grid::ggml_type_of_grid(own);
  const int64_t block = type == nullptr ? 1 : type->block;
  // A block must not reach into the next output of an expert's matrix.
  const bool matrix = tensor.shape.size() == 2 || tensor.shape.size() == 3;
  const int64_t width = matrix ? tensor.shape.back() : 0;
  if (width <= 0 || width % block != 0) {
    return {{},
            0,
            "expected a matrix (or one for each expert) with rows of whole blocks of " +
                std::to_string(block) + ", got " + shape_text(tensor.shape)};
  }
  if (type != nullptr) return {{own}, 0, ""};
  const auto* near = std::find_if(std::begin(kNearest), std::end(kNearest) - 1,
                                  [&](const Nearest& one) { return one.bits >= info.bits; });
  Choice choice{{near->plain, near->offset}, has_offset(info) ? std::size_t{1} : 0, ""};
  for (const grid::GgmlType* other : types_by_size()) {
    const bool new_one =
        std::find(choice.grids.begin(), choice.grids.end(), other->grid) == choice.grids.end();
    if (new_one && width % other->block == 0) choice.grids.emplace_back(other->grid);
  }
  return choice;
}

}  // namespace qat
