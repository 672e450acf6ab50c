#include "qat/grid/grid.hpp"

#include <array>
#include <string>
#include <vector>

#include "grid/float_grid.hpp"
#include "grid/integer_grids.hpp"
#include "grid/row_grid.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/bf16.hpp"
#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/f32.hpp"
#include "qat/grid/ggml.hpp"
#include "qat/grid/mxfp4.hpp"
#include "qat/grid/nvfp4.hpp"
#include "qat/grid/offset_block.hpp"
#include "qat/grid/pack.hpp"
#include "qat/grid/q1_0.hpp"
#include "qat/grid/q2_0.hpp"
#include "qat/grid/q2_k.hpp"
#include "qat/grid/q3_k.hpp"
#include "qat/grid/q4_k.hpp"
#include "qat/grid/q6_k.hpp"
#include "qat/grid/q8_0.hpp"
#include "qat/grid/signed_block.hpp"
#include "qat/grid/tq1_0.hpp"
#include "qat/grid/tq2_0.hpp"

namespace qat::grid {
namespace {

template <class Codec>
GridPair floats() {
  static const FloatGrid<Codec> grid;
  return {&grid, &grid};
}

template <class Codec>
GridPair codes() {
  static const RowGrid<Codec> fast(row_kernels(Codec::kInfo.name));
  static const RowGrid<Codec> reference(RowKernels{});
  return {&fast, &reference};
}

/// Every grid outside the integer families; a new number format adds its codec's line here.
const std::vector<GridPair>& registry() {
  static const std::vector<GridPair> pairs{floats<F32>(),  floats<F16>(),  floats<BF16>(), codes<Q4_0>(),
                                           codes<Q4_1>(),  codes<Q5_0>(),  codes<Q5_1>(),  codes<Q8_0>(),
                                           codes<Q2_0>(),  codes<Q1_0>(),  codes<TQ1_0>(), codes<TQ2_0>(),
                                           codes<Mxfp4>(), codes<Nvfp4>(), codes<Q2_K>(),  codes<Q3_K>(),
                                           codes<Q4_K>(),  codes<Q5_K>(),  codes<Q6_K>()};
  return pairs;
}

/// The grid of that name, or nothing and what is wrong with the name.
std::optional<GridPair> look_up(std::string_view name, std::optional<BadName>& bad) {
  for (const GridPair& pair : registry()) {
    if (pair.fast->info().name == name) return pair;
  }
  const std::optional<GridPair> found = find_integer(name, bad);
  if (found || bad) return found;
  std::string legal;
  for (const std::string_view one : names()) legal.append(legal.empty() ? "" : ", ").append(one);
  bad = BadName{"one of " + legal, "\"" + std::string(name) + "\""};
  return std::nullopt;
}

GridPair pair_of(std::string_view name) {
  std::optional<BadName> bad;
  if (const auto found = look_up(name, bad)) return *found;
  throw ArgumentError("grid: expected " + bad->expected + ", got " + bad->got);
}

}  // namespace

std::string_view to_string(Status status) noexcept {
  switch (status) {
    case Status::kOk:
      return "is fine";
    case Status::kNotFinite:
      return "is not finite";
    case Status::kOverflow:
      return "has a value or scale beyond its stored type";
  }
  return "?";
}

int Grid::params() const noexcept {
  int total = 0;
  for (const Field& field : info().fields) total += field.count;
  return total;
}

const Grid& find(std::string_view name) {
  return *pair_of(name).fast;
}

const Grid& reference(std::string_view name) {
  return *pair_of(name).reference;
}

std::vector<std::string_view> names() {
  std::vector<std::string_view> all;
  for (const GridPair& pair : registry()) all.push_back(pair.fast->info().name);
  all.insert(all.end(), integer_names().begin(), integer_names().end());
  return all;
}

std::optional<BadName> bad_name(std::string_view name) {
  std::optional<BadName> bad;
  look_up(name, bad);
  return bad;
}

NameOptions name_options(std::string_view name) {
  const NameOptions* const options = integer_options(name);
  return options == nullptr ? NameOptions{} : *options;
}

std::string with_options(std::string_view name, std::string_view scale_grid, std::string_view dequant_dtype) {
  std::string text(name);
  if (!scale_grid.empty()) text.append("@").append(scale_grid);
  if (!dequant_dtype.empty()) text.append(":").append(dequant_dtype);
  return text;
}

int64_t dtype_bytes(DType dtype) noexcept {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kU8:
    case DType::kI8:
    case DType::kE8M0:
    case DType::kE4M3:
      return 1;
  }
  return 0;
}

namespace {

/// Bytes of the stored parameters of one block.
int64_t parameter_bytes(const Info& info) {
  int64_t bytes = 0;
  for (const Field& field : info.fields) bytes += field.count * dtype_bytes(field.dtype);
  return bytes;
}

}  // namespace

int64_t row_bytes(const Grid& grid, int64_t n) noexcept {
  const Info& info = grid.info();
  if (info.is_float) return n * dtype_bytes(info.dtype);
  const GgmlType* const type = ggml_type_of_grid(info.name);
  if (type != nullptr && n % type->block == 0) return n / type->block * type->bytes;
  const int64_t blocks = info.block == kWholeTensor ? 0 : grid.blocks(n);
  return packed_bytes(n, info.bits) + blocks * parameter_bytes(info);
}

int64_t tensor_bytes(const Grid& grid, int64_t rows, int64_t n) noexcept {
  const int64_t bytes = rows * row_bytes(grid, n);
  return grid.info().block == kWholeTensor ? bytes + parameter_bytes(grid.info()) : bytes;
}

}  // namespace qat::grid
