#include "values.hpp"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "qat/grid/bf16.hpp"
#include "qat/grid/f16.hpp"

namespace qat::models {
namespace {

/// Values that a thread should have before another one is worth waking.
constexpr int64_t kGrain = 65536;

template <class Stored, class Convert>
void convert(const std::byte* bytes, int64_t n, float* values, Convert to_float) {
  for (int64_t i = 0; i < n; ++i) {
    Stored stored;
    std::memcpy(&stored, bytes + i * static_cast<int64_t>(sizeof stored), sizeof stored);
    values[i] = to_float(stored);
  }
}

void read_floats(const std::byte* bytes, grid::DType dtype, int64_t n, float* values) {
  switch (dtype) {
    case grid::DType::kF16:
      return convert<uint16_t>(bytes, n, values, [](uint16_t half) { return grid::f16_value(half); });
    case grid::DType::kBF16:
      return convert<uint16_t>(bytes, n, values, [](uint16_t half) { return grid::bf16_value(half); });
    default:
      std::memcpy(values, bytes, static_cast<size_t>(n) * sizeof(float));
  }
}

}  // namespace

at::Tensor read_floats(std::span<const std::byte> bytes, grid::DType dtype,
                       const std::vector<int64_t>& shape) {
  at::Tensor values = at::empty(shape, at::kFloat);
  float* to = values.mutable_data_ptr<float>();
  const int64_t width = grid::dtype_bytes(dtype);
  at::parallel_for(0, values.numel(), kGrain, [&](int64_t begin, int64_t end) {
    read_floats(bytes.data() + begin * width, dtype, end - begin, to + begin);
  });
  return values;
}

at::Tensor read_ggml(std::span<const std::byte> bytes, const grid::GgmlType& type,
                     const std::vector<int64_t>& shape, const std::vector<int64_t>& order) {
  const grid::Grid& grid = grid::find(type.grid);
  at::Tensor values = at::empty(shape, at::kFloat);
  float* to = values.mutable_data_ptr<float>();
  const int64_t n = shape.back();
  const int64_t rows = values.numel() / n;
  const int64_t row_bytes = n / type.block * type.bytes;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
    std::vector<int8_t> codes(static_cast<size_t>(n));
    std::vector<float> scales(static_cast<size_t>(grid.blocks(n) * grid.params()));
    for (int64_t row = begin; row < end; ++row) {
      const std::byte* from = bytes.data() + row * row_bytes;
      float* target = to + (order.empty() ? row : order[static_cast<size_t>(row)]) * n;
      if (type.unpack == nullptr) {
        read_floats(from, grid.info().dtype, n, target);
      } else {
        type.unpack(reinterpret_cast<const uint8_t*>(from), n, codes.data(), scales.data());
        grid.decode(codes.data(), n, scales.data(), target);
      }
    }
  });
  return values;
}

}  // namespace qat::models
