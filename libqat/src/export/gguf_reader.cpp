#include "export/gguf_reader.hpp"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "checkpoint/check.hpp"
#include "export/hf_plan.hpp"
#include "qat/core/error.hpp"
#include "qat/export/gguf_model.hpp"

namespace qat {
namespace {

/// A tensor of the file row by row.
struct Rows {
  const uint8_t* bytes;
  int64_t count;
  int64_t width;  ///< values in a row
  int64_t row_bytes;
  std::vector<int64_t> order;  ///< see GgufModel::row_order

  Rows(const GgufModel& model, const GgufModelTensor& tensor)
      : bytes(reinterpret_cast<const uint8_t*>(tensor.stored->data.data())),
        count(tensor.stored->shape().front()),
        width(1),
        order(model.row_order(tensor)) {
    const std::vector<int64_t> shape = tensor.stored->shape();
    for (std::size_t i = 1; i < shape.size(); ++i) width *= shape[i];
    row_bytes = width / tensor.type->block * tensor.type->bytes;
  }

  /// Calls `read(bytes of a row, its place)` for every row, on all threads.
  template <class Read>
  void each(const Read& read) const {
    constexpr int64_t kValuesPerTask = 65536;
    at::parallel_for(0, count, std::max<int64_t>(1, kValuesPerTask / width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        read(bytes + row * row_bytes, order.empty() ? row : order[static_cast<std::size_t>(row)]);
      }
    });
  }
};

QuantizedTensor read_codes(const Rows& rows, const GgufModelTensor& tensor) {
  const grid::Grid& grid = grid::find(tensor.type->grid);
  QuantizedTensor result{Scheme{std::string(tensor.type->grid)}, tensor.stored->shape(),
                         at::empty({rows.count, rows.width}, at::kChar),
                         at::empty({rows.count, grid.blocks(rows.width), grid.params()}, at::kFloat)};
  auto* codes = result.codes.mutable_data_ptr<int8_t>();
  auto* scales = result.scales.mutable_data_ptr<float>();
  const int64_t scales_per_row = grid.blocks(rows.width) * grid.params();
  rows.each([&](const uint8_t* bytes, int64_t row) {
    tensor.type->unpack(bytes, rows.width, codes + row * rows.width, scales + row * scales_per_row);
  });
  return result;
}

at::ScalarType torch_dtype(grid::DType dtype) {
  return dtype == grid::DType::kF16 ? at::kHalf : dtype == grid::DType::kBF16 ? at::kBFloat16 : at::kFloat;
}

at::Tensor read_values(const Rows& rows, const GgufModelTensor& tensor) {
  const at::ScalarType dtype = torch_dtype(grid::find(tensor.type->grid).info().dtype);
  const at::Tensor values = at::empty(tensor.stored->shape(), dtype);
  auto* to = static_cast<uint8_t*>(values.mutable_data_ptr());
  rows.each([&](const uint8_t* bytes, int64_t row) {
    std::memcpy(to + row * rows.row_bytes, bytes, static_cast<std::size_t>(rows.row_bytes));
  });
  return values;
}

}  // namespace

QuantizedCheckpoint read_gguf(const std::string& path) {
  const GgufModel model("import_checkpoint", path);
  model.require_complete();
  QuantizedCheckpoint checkpoint;
  checkpoint.config = model.config();
  checkpoint.tokenizer = path;
  for (const auto& [name, tensor] : model.tensors()) {
    if (tensor.rule == nullptr) {
      throw FileError(model.where() + name + ": expected a tensor of a " + std::string(model.family().name) +
                      " model, got one that it does not have");
    }
    const Rows rows(model, tensor);
    if (tensor.type->unpack != nullptr) {
      checkpoint.quantized[name] = read_codes(rows, tensor);
      continue;
    }
    at::Tensor values = read_values(rows, tensor);
    checkpoint.floats[name] = tensor.offset == 0.0 ? values : values.sub(tensor.offset);
  }
  std::set<std::string> keys;
  for (const auto& [name, tensor] : model.tensors()) keys.insert(name);
  checkpoint.aliases = tied_head(checkpoint.config, keys);
  checkpoint::check({model.where(), true}, checkpoint);
  return checkpoint;
}

}  // namespace qat
