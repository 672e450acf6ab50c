#include "qat/checkpoint/convert.hpp"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <mutex>

#include "check.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/convert.hpp"
#include "qat/grid/grid.hpp"

namespace qat {
namespace {

using checkpoint::Sizes;
using checkpoint::Subject;

/// The lowest row that failed and why, from any thread.
class Refusal {
 public:
  void record(int64_t row, std::string why) {
    const std::lock_guard lock(mutex_);
    if (row_ >= 0 && row_ <= row) return;
    row_ = row;
    why_ = std::move(why);
  }
  bool any() const noexcept { return row_ >= 0; }
  std::string text() const { return "row " + std::to_string(row_) + ", " + why_; }

 private:
  std::mutex mutex_;
  int64_t row_ = -1;
  std::string why_;
};

/// Rows as both grids see them: one row of everything where the target shares its scale over the tensor.
struct Rows {
  int64_t count;
  int64_t width;
  int64_t from_block;
  int64_t from_scales;  ///< parameters from one row of the source to the next
};

Rows rows_of(const Sizes& sizes, const grid::Grid& to) {
  const grid::Grid& from = sizes.grid;
  const bool joined = to.info().block == grid::kWholeTensor;
  const int64_t count = joined ? 1 : sizes.rows;
  const int64_t width = joined ? sizes.rows * sizes.width : sizes.width;
  if (from.info().block == grid::kWholeTensor) return {count, width, width, 0};
  return {count, width, from.block(sizes.width), from.blocks(sizes.width) * from.params()};
}

/// Every row on the target, or why the first of them is not.
std::string convert_rows(const Rows& rows, const QuantizedTensor& tensor, const grid::Grid& from,
                         const grid::Grid& to, QuantizedTensor& result) {
  const at::Tensor codes = tensor.codes.cpu().contiguous();
  const at::Tensor scales = tensor.scales.cpu().contiguous();
  const int8_t* code = codes.const_data_ptr<int8_t>();
  const float* scale = scales.const_data_ptr<float>();
  int8_t* to_code = result.codes.mutable_data_ptr<int8_t>();
  float* to_scale = result.scales.mutable_data_ptr<float>();
  const int64_t to_scales = to.blocks(rows.width) * to.params();
  Refusal refusal;
  constexpr int64_t kWeightsPerTask = 65536;
  at::parallel_for(
      0, rows.count, std::max<int64_t>(1, kWeightsPerTask / rows.width), [&](int64_t begin, int64_t end) {
        grid::RowConverter converter(from, rows.from_block, to, rows.width);
        for (int64_t row = begin; row < end; ++row) {
          std::string why = converter.convert(code + row * rows.width, scale + row * rows.from_scales,
                                              to_code + row * rows.width, to_scale + row * to_scales);
          if (!why.empty()) return refusal.record(row, std::move(why));
        }
      });
  return refusal.any() ? refusal.text() : "";
}

/// A tensor that has been found legal.
struct Checked {
  const Subject& subject;
  const std::string& key;
  const QuantizedTensor& tensor;
  Sizes sizes;

  Checked(const Subject& where, const std::string& name, const QuantizedTensor& given)
      : subject(where), key(name), tensor(given), sizes(check(where, name, given)) {}

 private:
  static Sizes check(const Subject& subject, const std::string& key, const QuantizedTensor& tensor) {
    QuantizedCheckpoint only;
    only.quantized[key] = tensor;
    checkpoint::check(subject, only);
    return checkpoint::sizes_of(subject, key, tensor);
  }
};

std::optional<QuantizedTensor> convert(const Checked& checked, std::string_view grid, std::string& why) {
  const auto& [subject, key, tensor, sizes] = checked;
  const grid::Grid& to = grid::find(grid);
  if (to.info().is_float) subject.fail(key, "a grid with codes", "\"" + std::string(grid) + "\"");
  if (&to == &sizes.grid) return tensor;
  if (!to.divides(sizes.width)) {
    why = "rows of " + std::to_string(sizes.width) + " weights are not whole blocks of " +
          std::to_string(to.info().block) + " (" + std::string(grid) + ")";
    return std::nullopt;
  }
  const Rows rows = rows_of(sizes, to);
  QuantizedTensor result{Scheme{std::string(to.info().name)}, tensor.shape,
                         at::empty({sizes.rows, sizes.width}, at::kChar),
                         at::empty({rows.count, to.blocks(rows.width), to.params()}, at::kFloat)};
  why = convert_rows(rows, tensor, sizes.grid, to, result);
  if (!why.empty()) return std::nullopt;
  return result;
}

const Subject kSubject{"convert_tensor: ", false};

}  // namespace

std::optional<QuantizedTensor> convert_tensor(const std::string& key, const QuantizedTensor& tensor,
                                              std::string_view grid, std::string* why) {
  std::string reason;
  auto result = convert(Checked(kSubject, key, tensor), grid, reason);
  if (!result && why != nullptr) *why = reason;
  return result;
}

std::optional<QuantizedTensor> convert_to_first(const std::string& key, const QuantizedTensor& tensor,
                                                const std::vector<std::string>& grids,
                                                std::vector<std::string>& why) {
  const Checked checked(kSubject, key, tensor);
  for (const std::string& grid : grids) {
    if (auto result = convert(checked, grid, why.emplace_back())) return result;
  }
  return std::nullopt;
}

QuantizedCheckpoint convert_tensors(const QuantizedCheckpoint& checkpoint,
                                    const std::map<std::string, std::string>& grids,
                                    std::map<std::string, std::string>& refused) {
  QuantizedCheckpoint result = checkpoint;
  for (const auto& [key, grid] : grids) {
    const auto found = result.quantized.find(key);
    if (found == result.quantized.end()) {
      throw ArgumentError("convert_tensors: " + key +
                          ": expected a quantized tensor of the checkpoint, got none");
    }
    std::string why;
    if (auto converted = convert_tensor(key, found->second, grid, &why)) {
      found->second = *std::move(converted);
    } else {
      refused[key] = why;
    }
  }
  return result;
}

}  // namespace qat
