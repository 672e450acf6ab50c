#include "qat/grid/grid.hpp"

#include <array>
#include <string>

#include "grid/row_grid.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/bf16.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/f32.hpp"
#include "qat/grid/ggml.hpp"
#include "qat/grid/int_symmetric.hpp"
#include "qat/grid/mxfp4.hpp"
#include "qat/grid/nvfp4.hpp"
#include "qat/grid/pack.hpp"
#include "qat/grid/q1_0.hpp"
#include "qat/grid/q2_0.hpp"
#include "qat/grid/q2_k.hpp"
#include "qat/grid/q3_k.hpp"
#include "qat/grid/q4_0.hpp"
#include "qat/grid/q4_1.hpp"
#include "qat/grid/q4_k.hpp"
#include "qat/grid/q5_0.hpp"
#include "qat/grid/q5_1.hpp"
#include "qat/grid/q6_k.hpp"
#include "qat/grid/q8_0.hpp"
#include "qat/grid/tq1_0.hpp"
#include "qat/grid/tq2_0.hpp"

namespace qat::grid {
namespace {

/// A grid twice: as fast as this CPU allows, and as written in its codec.
struct Entry {
  const Grid* fast;
  const Grid* reference;
};

template <class Codec>
Entry floats() {
  static const FloatGrid<Codec> grid;
  return {&grid, &grid};
}

template <class Codec>
Entry codes() {
  static const RowGrid<Codec> fast(row_kernels(Codec::kInfo.name));
  static const RowGrid<Codec> reference(RowKernels{});
  return {&fast, &reference};
}

/// One scale per row, then per group, for every group size that consumers read.
template <int kBits>
std::array<Entry, 5> integers() {
  return {codes<IntSymmetric<kBits, kWholeRow>>(), codes<IntSymmetric<kBits, 32>>(),
          codes<IntSymmetric<kBits, 64>>(), codes<IntSymmetric<kBits, 128>>(),
          codes<IntSymmetric<kBits, 256>>()};
}

/// Every grid; a new number format adds its codec's line here.
const std::vector<Entry>& registry() {
  static const std::vector<Entry> entries = [] {
    std::vector<Entry> all{floats<F32>(), floats<F16>(), floats<BF16>()};
    all.insert(all.end(), {codes<Q4_0>(), codes<Q4_1>(), codes<Q5_0>(), codes<Q5_1>(), codes<Q8_0>()});
    all.insert(all.end(), {codes<Q2_0>(), codes<Q1_0>(), codes<TQ1_0>(), codes<TQ2_0>()});
    all.insert(all.end(), {codes<Mxfp4>(), codes<Nvfp4>()});
    all.insert(all.end(), {codes<Q2_K>(), codes<Q3_K>(), codes<Q4_K>(), codes<Q5_K>(), codes<Q6_K>()});
    for (const auto& family : {integers<8>(), integers<4>(), integers<3>(), integers<2>()}) {
      all.insert(all.end(), family.begin(), family.end());
    }
    return all;
  }();
  return entries;
}

const Entry& entry(std::string_view name) {
  std::string legal;
  for (const Entry& entry : registry()) {
    const std::string_view candidate = entry.fast->info().name;
    if (candidate == name) return entry;
    legal += legal.empty() ? "" : ", ";
    legal += candidate;
  }
  throw ArgumentError("grid: expected one of " + legal + ", got \"" + std::string(name) + "\"");
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
  return *entry(name).fast;
}

const Grid& reference(std::string_view name) {
  return *entry(name).reference;
}

std::vector<std::string_view> names() {
  std::vector<std::string_view> all;
  for (const Entry& entry : registry()) all.push_back(entry.fast->info().name);
  return all;
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

int64_t row_bytes(const Grid& grid, int64_t n) noexcept {
  const Info& info = grid.info();
  if (info.is_float) return n * dtype_bytes(info.dtype);
  const GgmlType* const type = ggml_type_of_grid(info.name);
  if (type != nullptr && n % type->block == 0) return n / type->block * type->bytes;
  int64_t per_block = 0;
  for (const Field& field : info.fields) per_block += field.count * dtype_bytes(field.dtype);
  return packed_bytes(n, info.bits) + grid.blocks(n) * per_block;
}

}  // namespace qat::grid
