#include "grid/integer_grids.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "grid/row_grid.hpp"
#include "qat/grid/int_asymmetric.hpp"
#include "qat/grid/int_symmetric.hpp"
#include "qat/grid/mlx_affine.hpp"

namespace qat::grid {
namespace {

constexpr std::array<std::string_view, 5> kScaleGridNames{"fp32", "fp16", "bf16", "bf16_fp16", "pow2"};
constexpr std::array kScaleGrids{ScaleGrid::kF32, ScaleGrid::kF16, ScaleGrid::kBF16, ScaleGrid::kBF16F16,
                                 ScaleGrid::kPow2};
constexpr std::array<std::string_view, 3> kDequantNames{"fp32", "fp16", "bf16"};
constexpr std::array kDequants{DType::kF32, DType::kF16, DType::kBF16};

constexpr NameOptions kAllOptions{kScaleGridNames, kDequantNames};
/// MLX computes in the type of the scales.
constexpr NameOptions kMlxOptions{kDequantNames, std::span(kDequantNames).first(1)};

/// What a file stores a scale of that grid in.
DType stored_type(ScaleGrid grid) {
  switch (grid) {
    case ScaleGrid::kF32:
      return DType::kF32;
    case ScaleGrid::kF16:
    case ScaleGrid::kBF16F16:
      return DType::kF16;
    case ScaleGrid::kBF16:
    case ScaleGrid::kPow2:
      return DType::kBF16;
  }
  return DType::kF32;
}

/// The epsilon of the type of a scale, which compressed-tensors puts where the scale would be 0.
float epsilon(ScaleGrid grid) {
  switch (grid) {
    case ScaleGrid::kF16:
      return 0x1p-10F;
    case ScaleGrid::kBF16:
    case ScaleGrid::kBF16F16:
      return 0x1p-7F;
    case ScaleGrid::kF32:
    case ScaleGrid::kPow2:
      return 0x1p-23F;
  }
  return 0x1p-23F;
}

enum class Family { kSymmetric, kAsymmetric, kMlx, kMobile };

/// A name without options.
struct Base {
  std::string name;
  Family family;
  int bits;
  int64_t block;
};

struct Options {
  ScaleGrid scale_grid;
  DType dequant;
};

/// A grid and all that its views point to; never moved.
struct IntegerGrid {
  std::string name;
  std::array<Field, 2> fields;
  Info info;
  std::unique_ptr<const Grid> fast;
  std::unique_ptr<const Grid> reference;
};

IntSymmetric symmetric_codec(const Info& info, const Options& options) {
  const auto levels = static_cast<float>(1 << info.bits);
  return {&info,
          info.block,
          options.scale_grid,
          options.dequant,
          (levels - 1.0F) / 2.0F,
          0.0F,
          epsilon(options.scale_grid),
          largest_value(options.dequant) / (levels / 2.0F),
          static_cast<float>(info.code_min),
          static_cast<float>(info.code_max),
          true};
}

IntSymmetric mobile_codec(const Info& info, const Options& options) {
  constexpr float kLeastMagnitude = 1e-9F;
  constexpr float kLeastNormalHalf = 0x1p-14F;
  const auto most = static_cast<float>(info.code_max);
  return {&info,
          info.block,
          options.scale_grid,
          options.dequant,
          most,
          kLeastMagnitude,
          kLeastNormalHalf,
          largest_value(options.dequant) / (most + 1.0F),
          info.bits == 8 ? -most : -most - 1.0F,
          most,
          false};
}

IntAsymmetric asymmetric_codec(const Info& info, const Options& options) {
  const auto steps = static_cast<float>((1 << info.bits) - 1);
  return {&info,
          info.block,
          options.scale_grid,
          options.dequant,
          epsilon(options.scale_grid),
          largest_value(options.dequant) / steps,
          static_cast<float>(info.code_min),
          static_cast<float>(info.code_max)};
}

MlxAffine mlx_codec(const Info& info, const Options& options) {
  return {&info, info.block, stored_type(options.scale_grid), static_cast<float>((1 << info.bits) - 1),
          info.code_min};
}

/// The stored parameters of a block; returns how many fields there are.
size_t set_fields(Family family, DType scale_type, std::array<Field, 2>& fields) {
  fields[0] = {"scales", 1, scale_type};
  if (family == Family::kAsymmetric) fields[1] = {"zero_points", 1, DType::kI8};
  if (family == Family::kMlx) fields[1] = {"biases", 1, scale_type};
  return family == Family::kAsymmetric || family == Family::kMlx ? 2 : 1;
}

template <class Codec>
void set_grids(const Codec& codec, IntegerGrid& grid) {
  grid.fast = std::make_unique<RowGrid<Codec>>(row_kernels(codec), codec);
  grid.reference = std::make_unique<RowGrid<Codec>>(RowKernels{}, codec);
}

std::unique_ptr<const IntegerGrid> make_grid(const Base& base, const Options& options, std::string name) {
  auto made = std::make_unique<IntegerGrid>();
  made->name = std::move(name);
  const size_t count = set_fields(base.family, stored_type(options.scale_grid), made->fields);
  const std::span<const Field> fields(made->fields.data(), count);
  const int levels = 1 << base.bits;
  const int least = base.family == Family::kMlx && base.bits < 8 ? 0 : -levels / 2;
  made->info = {made->name, base.bits, base.block, least, least + levels - 1, fields, false, DType::kF32};
  switch (base.family) {
    case Family::kSymmetric:
      set_grids(symmetric_codec(made->info, options), *made);
      break;
    case Family::kAsymmetric:
      set_grids(asymmetric_codec(made->info, options), *made);
      break;
    case Family::kMlx:
      set_grids(mlx_codec(made->info, options), *made);
      break;
    case Family::kMobile:
      set_grids(mobile_codec(made->info, options), *made);
      break;
  }
  return made;
}

/// "" for a row, "_g64" for groups of 64 and so on.
std::string block_suffix(int64_t block) {
  return block == kWholeRow ? "" : "_g" + std::to_string(block);
}

void add_compressed_tensors(Family family, const std::string& ending, std::vector<Base>& bases) {
  for (const int bits : {8, 4, 3, 2}) {
    const std::string name = "int" + std::to_string(bits);
    bases.push_back({name + "_tensor" + ending, family, bits, kWholeTensor});
    bases.push_back({name + "_channel" + ending, family, bits, kWholeRow});
    for (const int64_t block : {32, 64, 128, 256}) {
      bases.push_back({name + block_suffix(block) + ending, family, bits, block});
    }
  }
}

std::vector<Base> make_bases() {
  std::vector<Base> bases;
  add_compressed_tensors(Family::kSymmetric, "", bases);
  add_compressed_tensors(Family::kAsymmetric, "_asym", bases);
  for (const int bits : {8, 6, 5, 4, 3, 2}) {
    for (const int64_t block : {32, 64, 128}) {
      bases.push_back({"mlx" + std::to_string(bits) + block_suffix(block), Family::kMlx, bits, block});
    }
  }
  for (const int bits : {8, 4, 2}) {
    for (const int64_t block : {kWholeRow, int64_t{256}}) {
      bases.push_back({"mobile" + std::to_string(bits) + block_suffix(block), Family::kMobile, bits, block});
    }
  }
  return bases;
}

const std::vector<Base>& bases() {
  static const std::vector<Base> all = make_bases();
  return all;
}

const Base* find_base(std::string_view name) {
  const auto found =
      std::find_if(bases().begin(), bases().end(), [&](const Base& base) { return base.name == name; });
  return found == bases().end() ? nullptr : &*found;
}

std::string joined(std::span<const std::string_view> names) {
  std::string text;
  for (const std::string_view name : names) text.append(text.empty() ? "" : ", ").append(name);
  return text;
}

/// A name taken apart; a part that is not written is its default, "fp32".
struct Spelling {
  std::string_view base;
  std::string_view scale_grid = "fp32";
  std::string_view dequant = "fp32";
};

Spelling spelling_of(std::string_view name) {
  Spelling parts;
  if (const size_t colon = name.find(':'); colon != std::string_view::npos) {
    parts.dequant = name.substr(colon + 1);
    name = name.substr(0, colon);
  }
  if (const size_t at = name.find('@'); at != std::string_view::npos) {
    parts.scale_grid = name.substr(at + 1);
    name = name.substr(0, at);
  }
  parts.base = name;
  return parts;
}

bool contains(std::span<const std::string_view> names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::optional<BadName> bad_options(const Spelling& parts, const NameOptions& legal) {
  const auto bad = [&](const char* what, std::span<const std::string_view> names, std::string_view got) {
    return BadName{std::string(what) + " of " + std::string(parts.base) + " that is one of " + joined(names),
                   "\"" + std::string(got) + "\""};
  };
  if (!contains(legal.scale_grids, parts.scale_grid)) {
    return bad("a scale grid (behind \"@\")", legal.scale_grids, parts.scale_grid);
  }
  if (!contains(legal.dequant_dtypes, parts.dequant)) {
    return bad("a dequant dtype (behind \":\")", legal.dequant_dtypes, parts.dequant);
  }
  return std::nullopt;
}

template <class Values, class Names>
auto value_of(const Values& values, const Names& names, std::string_view name) {
  return values[static_cast<size_t>(std::find(names.begin(), names.end(), name) - names.begin())];
}

std::string canonical(const Spelling& parts) {
  const auto unless_default = [](std::string_view value) { return value == "fp32" ? "" : value; };
  return with_options(parts.base, unless_default(parts.scale_grid), unless_default(parts.dequant));
}

}  // namespace

const std::vector<std::string_view>& integer_names() {
  static const std::vector<std::string_view> names = [] {
    std::vector<std::string_view> all;
    for (const Base& base : bases()) all.push_back(base.name);
    return all;
  }();
  return names;
}

const NameOptions* integer_options(std::string_view name) {
  const Base* const base = find_base(name);
  if (base == nullptr) return nullptr;
  return base->family == Family::kMlx ? &kMlxOptions : &kAllOptions;
}

std::optional<GridPair> find_integer(std::string_view name, std::optional<BadName>& bad) {
  const Spelling parts = spelling_of(name);
  const Base* const base = find_base(parts.base);
  if (base == nullptr) return std::nullopt;
  bad = bad_options(parts, *integer_options(base->name));
  if (bad) return std::nullopt;

  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<const IntegerGrid>, std::less<>> made;
  const std::lock_guard lock(mutex);
  std::unique_ptr<const IntegerGrid>& grid = made[canonical(parts)];
  if (grid == nullptr) {
    grid = make_grid(*base,
                     {value_of(kScaleGrids, kScaleGridNames, parts.scale_grid),
                      value_of(kDequants, kDequantNames, parts.dequant)},
                     canonical(parts));
  }
  return GridPair{grid->fast.get(), grid->reference.get()};
}

}  // namespace qat::grid
