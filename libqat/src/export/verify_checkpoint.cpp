#include <ATen/core/Tensor.h>

#include "export/comparison.hpp"

namespace qat {
namespace {

void differ(const std::string& tensor, const char* what, const std::string& expected, const std::string& got,
            std::vector<Difference>& differences) {
  if (expected != got) differences.push_back({tensor, what, 1, "expected " + expected + ", got " + got});
}

void compare_floats(const std::string& key, const at::Tensor& expected, const at::Tensor& stored,
                    std::vector<Difference>& differences) {
  const std::size_t before = differences.size();
  differ(key, "type", std::string(expected.dtype().name()), std::string(stored.dtype().name()), differences);
  differ(key, "shape", shape_text(expected.sizes().vec()), shape_text(stored.sizes().vec()), differences);
  if (differences.size() != before) return;
  const at::Tensor values = expected.detach().cpu().contiguous();
  Mismatch mismatch;
  compare_bits(0, static_cast<const uint8_t*>(values.const_data_ptr()),
               static_cast<const uint8_t*>(stored.const_data_ptr()), values.numel(),
               static_cast<int64_t>(values.element_size()), mismatch);
  report(key, "values", mismatch, differences);
}

/// Calls `compare` for keys on both sides, and reports the keys of one side only.
template <class Map, class Compare>
void compare_maps(const Map& expected, const Map& stored, Compare compare,
                  std::vector<Difference>& differences) {
  for (const auto& [key, value] : expected) {
    const auto found = stored.find(key);
    if (found == stored.end()) {
      differences.push_back({key, "missing", 1, "expected a tensor, got none"});
    } else {
      compare(key, value, found->second, differences);
    }
  }
  for (const auto& [key, value] : stored) {
    if (!expected.contains(key)) differences.push_back({key, "extra", 1, "expected no such tensor, got one"});
  }
}

}  // namespace

void compare_quantized(const std::string& key, const QuantizedTensor& expected, const QuantizedTensor& stored,
                       std::vector<Difference>& differences) {
  const std::size_t before = differences.size();
  differ(key, "type", expected.scheme.weight, stored.scheme.weight, differences);
  differ(key, "shape", shape_text(expected.shape), shape_text(stored.shape), differences);
  if (differences.size() != before) return;
  const at::Tensor codes = expected.codes.cpu().contiguous(), scales = expected.scales.cpu().contiguous();
  // One row of everything where the whole tensor shares its scale.
  const int64_t rows = scales.size(0), width = codes.numel() / rows, scales_per_row = scales.numel() / rows;
  GridComparison comparison(grid::find(expected.scheme.weight), width);
  for (int64_t row = 0; row < rows; ++row) {
    comparison.add_row(row, codes.const_data_ptr<int8_t>() + row * width,
                       scales.const_data_ptr<float>() + row * scales_per_row,
                       stored.codes.const_data_ptr<int8_t>() + row * width,
                       stored.scales.const_data_ptr<float>() + row * scales_per_row);
  }
  comparison.report(key, differences);
}

std::vector<Difference> verify_checkpoint(const std::string& path, const QuantizedCheckpoint& checkpoint) {
  const QuantizedCheckpoint stored = load(path);
  std::vector<Difference> differences;
  compare_maps(checkpoint.quantized, stored.quantized, compare_quantized, differences);
  compare_maps(checkpoint.floats, stored.floats, compare_floats, differences);
  const auto compare_alias = [](const std::string& key, const std::string& holder, const std::string& got,
                                std::vector<Difference>& found) {
    differ(key, "alias", "an alias of " + holder, "an alias of " + got, found);
  };
  compare_maps(checkpoint.aliases, stored.aliases, compare_alias, differences);
  if (checkpoint.config != stored.config) {
    differences.push_back({"config", "metadata", 1, "expected the checkpoint's configuration, got another"});
  }
  return differences;
}

}  // namespace qat
