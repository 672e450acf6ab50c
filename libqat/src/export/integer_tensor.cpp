#include "export/integer_tensor.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>

#include <algorithm>

#include "export/activation_scales.hpp"
#include "export/comparison.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/stored.hpp"

namespace qat {
namespace {

constexpr std::string_view kDtypes[] = {"bfloat16", "float16", "float32"};

/// "bf16", as the names of grids say it.
std::string short_name(std::string_view dtype) {
  return dtype == "bfloat16" ? "bf16" : dtype == "float16" ? "fp16" : "fp32";
}

/// The same of a stored type.
std::string short_name(grid::DType stored) {
  return stored == grid::DType::kBF16 ? "bf16" : stored == grid::DType::kF16 ? "fp16" : "fp32";
}

/// Without options, as int and mobile grids are named.
std::string base_name(const IntegerTensor& tensor, const std::string& family) {
  const std::string name = family + std::to_string(tensor.bits);
  if (tensor.block == grid::kWholeTensor) return name + "_tensor";
  if (tensor.block == grid::kWholeRow) return family == "int" ? name + "_channel" : name;
  return name + "_g" + std::to_string(tensor.block);
}

std::string with_options(const std::string& base, const std::string& scale, const std::string& product) {
  return base + (scale == "fp32" ? "" : "@" + scale) + (product == "fp32" ? "" : ":" + product);
}

const grid::Grid* find_or_null(const std::string& name) {
  try {
    return &grid::find(name);
  } catch (const ArgumentError&) {
    return nullptr;
  }
}

/// -1, or the first row with a code or a scale that the grid does not have.
int64_t first_illegal_row(const grid::Grid& grid, const at::Tensor& codes, const at::Tensor& scales) {
  const grid::Info& info = grid.info();
  const int64_t rows = codes.size(0), width = codes.size(1), groups = scales.size(1);
  for (int64_t row = 0; row < rows; ++row) {
    const int8_t* first = codes.const_data_ptr<int8_t>() + row * width;
    const auto [least, greatest] = std::minmax_element(first, first + width);
    if (*least < info.code_min || *greatest > info.code_max) return row;
    for (int64_t i = 0; i < groups && row < scales.size(0); ++i) {
      if (grid::first_not_stored(grid, scales.const_data_ptr<float>() + row * groups + i) >= 0) return row;
    }
  }
  return -1;
}

bool fits(const IntegerTensor& tensor, const grid::Grid& grid) {
  const grid::Info& info = grid.info();
  return info.bits == tensor.bits && info.block == tensor.block && is_symmetric_integer(info.name) &&
         first_illegal_row(grid, tensor.codes, tensor.scales) < 0;
}

QuantizedTensor quantized(const IntegerTensor& tensor, const grid::Grid& grid) {
  return {{std::string(grid.info().name)}, tensor.shape, tensor.codes, tensor.scales.unsqueeze(-1)};
}

/// Fills in what each of the dtypes does not reproduce.
void judge(const QuantizedCheckpoint& checkpoint, std::vector<ConsumerDtype>& judged) {
  for (const auto& [key, tensor] : checkpoint.quantized) {
    const IntegerTensor integers = integer_tensor(key, tensor);
    const at::Tensor exact = dequantize_tensor(key, tensor).reshape(integers.codes.sizes());
    for (ConsumerDtype& one : judged) {
      if (at::equal(integers.weight(one.dtype->tensor).to(at::kFloat), exact)) continue;
      one.obstacles.push_back({key, tensor.scheme.weight,
                               "its numbers are not those that a " + std::string(one.dtype->name) +
                                   " model computes from its codes and scales"});
    }
  }
  for (const auto& [key, tensor] : checkpoint.floats) {
    if (!is_weight(tensor) || is_activation_scale(key)) continue;
    for (ConsumerDtype& one : judged) {
      if (!at::equal(tensor.to(one.dtype->tensor).to(tensor.scalar_type()), tensor)) {
        one.rounded_floats.push_back(key);
      }
    }
  }
}

}  // namespace

at::Tensor IntegerTensor::weight(at::ScalarType dtype) const {
  const int64_t rows = scales.size(0), groups = scales.size(1);
  const at::Tensor grouped = codes.reshape({rows, groups, -1}).to(dtype);
  return (grouped * scales.unsqueeze(-1).to(dtype)).reshape(codes.sizes());
}

bool is_symmetric_integer(std::string_view name) {
  const grid::Info& info = grid::find(name).info();
  const bool family = info.name.starts_with("int") || info.name.starts_with("mobile");
  return family && info.fields.size() == 1 && info.fields[0].count == 1;
}

bool is_grid(const std::string& name) {
  return find_or_null(name) != nullptr;
}

IntegerTensor integer_tensor(const std::string& key, const QuantizedTensor& tensor) {
  const grid::Grid& grid = grid::find(tensor.scheme.weight);
  const grid::Info& info = grid.info();
  const bool whole = info.block == grid::kWholeTensor;
  const int64_t columns = tensor.shape.back(), width = whole ? tensor.codes.numel() : columns;
  const int64_t rows = whole ? 1 : tensor.codes.numel() / columns;
  const auto fail = [&](const std::string& expected, const std::string& got) {
    throw ArgumentError("export_checkpoint: " + key + ": expected " + expected + " (" +
                        std::string(info.name) + "), got " + got);
  };
  const std::vector<int64_t> scales{rows, grid.blocks(width), 1};
  if (!grid.divides(width) || tensor.codes.numel() != rows * width || tensor.codes.dtype() != at::kChar ||
      tensor.scales.numel() != rows * grid.blocks(width) || tensor.scales.dtype() != at::kFloat) {
    fail("codes int8 and scales float32" + shape_text(scales),
         shape_text(tensor.codes.sizes().vec()) + " and " + shape_text(tensor.scales.sizes().vec()) +
             " or another dtype");
  }
  IntegerTensor result{info.bits,
                       info.block,
                       info.fields[0].dtype,
                       tensor.codes.cpu().reshape({-1, columns}).contiguous(),
                       tensor.scales.cpu().reshape({rows, -1}).contiguous(),
                       tensor.shape};
  const int64_t row = first_illegal_row(grid, result.codes, result.scales);
  if (row >= 0) fail("codes and scales of the grid in row " + std::to_string(row), "others");
  return result;
}

QuantizedTensor on_grid(const std::string& key, const IntegerTensor& tensor, const HfDtype& dtype,
                        const std::string& family, const std::string& hint) {
  const std::string product = short_name(dtype.name), base = base_name(tensor, family);
  const at::Tensor exact = tensor.weight(dtype.tensor).to(at::kFloat);
  std::vector<std::string> names{hint};
  for (const std::string& plain : {base, base_name(tensor, family == "int" ? "mobile" : "int")}) {
    if (product != "fp32") names.push_back(with_options(plain, product, product));
    names.push_back(with_options(plain, short_name(tensor.stored), product));
  }
  for (const std::string& name : names) {
    const grid::Grid* grid = name.empty() ? nullptr : find_or_null(name);
    if (grid == nullptr || !fits(tensor, *grid)) continue;
    QuantizedTensor found = quantized(tensor, *grid);
    if (at::equal(dequantize_tensor(key, found).reshape(exact.sizes()), exact)) return found;
  }
  throw UnsupportedError("import_checkpoint: " + key + ": expected codes and scales of a grid like " + base +
                         " in a " + std::string(dtype.name) + " model, got numbers that no grid has");
}

ConsumerDtype consumer_dtype(const QuantizedCheckpoint& checkpoint, const std::string& wanted) {
  std::vector<ConsumerDtype> judged;
  for (const std::string_view name : kDtypes) {
    if (wanted.empty() || wanted == name) judged.push_back({&hf_dtype(name), {}, {}});
  }
  if (judged.empty()) hf_dtype(wanted);  // throws
  judge(checkpoint, judged);
  if (!wanted.empty()) return judged.front();
  for (const ConsumerDtype& one : judged) {
    if (one.obstacles.empty() && one.rounded_floats.empty()) return one;
  }
  const auto best = std::min_element(judged.begin(), judged.end(), [](const auto& one, const auto& other) {
    return one.obstacles.size() < other.obstacles.size();
  });
  if (best->obstacles.empty()) {
    const std::string dtype(best->dtype->name);
    for (const std::string& key : best->rounded_floats) {
      best->obstacles.push_back({key, std::string(checkpoint.floats.at(key).dtype().name()),
                                 "not exact in " + dtype + ", which the quantized tensors need; dtype " +
                                     dtype + " (--dtype " + dtype + ") rounds it"});
    }
  }
  return *best;
}

}  // namespace qat
