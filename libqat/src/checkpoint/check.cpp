#include "check.hpp"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "dtype.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/stored.hpp"

namespace qat::checkpoint {
namespace {

// Far beyond any model, and small enough that bits * width and rows * width stay within int64.
constexpr int64_t kMaxElements = int64_t{1} << 48;

std::string describe(const at::Tensor& tensor) {
  if (!tensor.defined()) return "none";
  return std::string(c10::toString(tensor.scalar_type())) + shape_text(tensor.sizes());
}

void expect(const Subject& subject, const std::string& key, const char* part, const at::Tensor& tensor,
            at::ScalarType dtype, at::IntArrayRef shape) {
  if (tensor.defined() && tensor.scalar_type() == dtype && tensor.sizes() == shape) return;
  subject.fail(key, std::string(part) + " " + c10::toString(dtype) + shape_text(shape), describe(tensor));
}

void check_codes(const Subject& subject, const std::string& key, const Sizes& sizes,
                 const at::Tensor& tensor) {
  expect(subject, key, "codes", tensor, at::kChar, {sizes.rows, sizes.width});
  const at::Tensor codes = tensor.cpu().contiguous();
  const int8_t* begin = codes.const_data_ptr<int8_t>();
  int8_t least = *begin;
  int8_t greatest = *begin;
  for (const int8_t* code = begin; code < begin + codes.numel(); ++code) {
    least = std::min(least, *code);
    greatest = std::max(greatest, *code);
  }
  const grid::Info& info = sizes.grid.info();
  if (least >= info.code_min && greatest <= info.code_max) return;
  subject.fail(key,
               "codes from " + std::to_string(info.code_min) + " to " + std::to_string(info.code_max) + " (" +
                   std::string(info.name) + ")",
               std::to_string(least < info.code_min ? least : greatest));
}

/// The field that parameter `index` of a block belongs to.
const grid::Field& field_of(const grid::Grid& grid, int index) {
  const auto fields = grid.info().fields;
  auto field = fields.begin();
  for (; index >= field->count; ++field) index -= field->count;
  return *field;
}

/// The first of these blocks with a parameter that is not such as the grid stores, or `end`.
int64_t first_bad_block(const grid::Grid& grid, const float* stored, int64_t begin, int64_t end) {
  while (begin < end && grid::first_not_stored(grid, stored + begin * grid.params()) < 0) ++begin;
  return begin;
}

void check_scales(const Subject& subject, const std::string& key, const Sizes& sizes,
                  const at::Tensor& tensor) {
  const grid::Grid& grid = sizes.grid;
  const int64_t blocks = sizes.scale_rows() * grid.blocks(sizes.width);
  expect(subject, key, "scales", tensor, at::kFloat,
         {sizes.scale_rows(), sizes.grid.blocks(sizes.width), sizes.grid.params()});
  const at::Tensor scales = tensor.cpu().contiguous();
  const float* stored = scales.const_data_ptr<float>();
  std::atomic<int64_t> first{blocks};
  constexpr int64_t kBlocksPerTask = 4096;
  at::parallel_for(0, blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    const int64_t bad = first_bad_block(grid, stored, begin, end);
    if (bad == end) return;
    for (int64_t seen = first; bad < seen && !first.compare_exchange_weak(seen, bad);) {
    }
  });
  if (first == blocks) return;
  const float* block = stored + first * grid.params();
  const int bad = grid::first_not_stored(grid, block);
  const grid::Field& field = field_of(grid, bad);
  subject.fail(key,
               "finite " + std::string(field.name) + " that their stored type (" +
                   std::string(name_of(field.dtype)) + ") holds",
               std::to_string(block[bad]) + " in row " + std::to_string(first / grid.blocks(sizes.width)));
}

void check_aliases(const Subject& subject, const QuantizedCheckpoint& checkpoint) {
  const auto holds = [&](const std::string& key) {
    return checkpoint.quantized.contains(key) || checkpoint.floats.contains(key);
  };
  for (const auto& [key, target] : checkpoint.aliases) {
    if (holds(key)) subject.fail(key, "an alias or a tensor", "both");
    if (!holds(target)) subject.fail(key, "an alias of a tensor", "\"" + target + "\", which is none");
  }
}

}  // namespace

void Subject::fail(const std::string& key, const std::string& expected, const std::string& got) const {
  std::string message = where;
  if (!key.empty()) message.append(key).append(": ");
  message.append("expected ").append(expected).append(", got ").append(got);
  if (is_file) throw FileError(message);
  throw ArgumentError(message);
}

std::string shape_text(at::IntArrayRef shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text.append(i == 0 ? "" : ", ").append(std::to_string(shape[i]));
  return text + "]";
}

Sizes sizes_of(const Subject& subject, const std::string& key, const Scheme& scheme,
               const std::vector<int64_t>& shape, int64_t rows) {
  if (grid::bad_name(scheme.weight)) {
    subject.fail(key, "a grid of this version", "\"" + scheme.weight + "\"");
  }
  const grid::Grid& grid = grid::find(scheme.weight);
  if (grid.info().is_float) subject.fail(key, "an integer grid", "\"" + scheme.weight + "\"");
  int64_t elements = shape.size() < 2 ? 0 : 1, before = 1, width = 0;
  for (const int64_t size : shape) {
    if (elements == 0 || size < 1 || size > kMaxElements / elements) {
      elements = 0;
      break;
    }
    elements *= size;
  }
  for (size_t i = 0; i + 1 < shape.size() && elements > 0 && width == 0; ++i) {
    before *= shape[i];
    if (before == rows) width = elements / rows;
  }
  if (width == 0 || !grid.divides(width)) {
    subject.fail(
        key,
        "a shape [R, ...] with rows of a multiple of " + std::to_string(grid.block(1)) + " weights (" +
            scheme.weight + ")",
        shape_text(shape) +
            (shape.empty() || rows == shape[0] ? "" : " for codes of " + std::to_string(rows) + " rows"));
  }
  return {grid, rows, width};
}

Sizes sizes_of(const Subject& subject, const std::string& key, const QuantizedTensor& tensor) {
  const bool stacked = tensor.shape.size() > 2 && tensor.codes.defined() && tensor.codes.dim() == 2;
  const int64_t first = tensor.shape.empty() ? 0 : tensor.shape[0];
  return sizes_of(subject, key, tensor.scheme, tensor.shape, stacked ? tensor.codes.size(0) : first);
}

void check(const Subject& subject, const QuantizedCheckpoint& checkpoint) {
  for (const auto& [key, tensor] : checkpoint.quantized) {
    const Sizes sizes = sizes_of(subject, key, tensor);
    check_codes(subject, key, sizes, tensor.codes);
    check_scales(subject, key, sizes, tensor.scales);
  }
  for (const auto& [key, tensor] : checkpoint.floats) {
    if (!tensor.defined() || !file_dtype(tensor.scalar_type())) {
      subject.fail(key, "a tensor of floats, integers or bools", describe(tensor));
    }
    if (checkpoint.quantized.contains(key)) subject.fail(key, "a quantized or a float tensor", "both");
  }
  check_aliases(subject, checkpoint);
}

}  // namespace qat::checkpoint
