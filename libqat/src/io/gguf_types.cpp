#include <algorithm>
#include <array>

#include "io/checked.hpp"
#include "io/gguf_format.hpp"
#include "qat/core/error.hpp"

namespace qat::io {
namespace {

constexpr std::array<std::string_view, 13> kTypeNames{"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                                      "bool", "string", "array", "u64", "i64", "f64"};

constexpr std::size_t kScalarCount = std::variant_size_v<GgufValue> / 2;

// Sizes only: the reader must bound a tensor of any type in the file, also of those that no grid of libqat
// describes. What the bytes mean is known to grid/ alone. (ggml/include/ggml.h `ggml_type`, ggml/src/ggml.c
// `type_traits`)
constexpr std::array<GgmlTypeSize, 35> kTypeSizes{{
    {0, "F32", 1, 4},         {1, "F16", 1, 2},         {2, "Q4_0", 32, 18},      {3, "Q4_1", 32, 20},
    {6, "Q5_0", 32, 22},      {7, "Q5_1", 32, 24},      {8, "Q8_0", 32, 34},      {9, "Q8_1", 32, 36},
    {10, "Q2_K", 256, 84},    {11, "Q3_K", 256, 110},   {12, "Q4_K", 256, 144},   {13, "Q5_K", 256, 176},
    {14, "Q6_K", 256, 210},   {15, "Q8_K", 256, 292},   {16, "IQ2_XXS", 256, 66}, {17, "IQ2_XS", 256, 74},
    {18, "IQ3_XXS", 256, 98}, {19, "IQ1_S", 256, 50},   {20, "IQ4_NL", 32, 18},   {21, "IQ3_S", 256, 110},
    {22, "IQ2_S", 256, 82},   {23, "IQ4_XS", 256, 136}, {24, "I8", 1, 1},         {25, "I16", 1, 2},
    {26, "I32", 1, 4},        {27, "I64", 1, 8},        {28, "F64", 1, 8},        {29, "IQ1_M", 256, 56},
    {30, "BF16", 1, 2},       {34, "TQ1_0", 256, 54},   {35, "TQ2_0", 256, 66},   {39, "MXFP4", 32, 17},
    {40, "NVFP4", 64, 36},    {41, "Q1_0", 128, 18},    {42, "Q2_0", 64, 18},
}};

}  // namespace

std::string_view to_string(GgufType type) noexcept {
  const auto number = static_cast<std::size_t>(type);
  return number < kTypeNames.size() ? kTypeNames[number] : "unknown";
}

GgufType element_type_of(const GgufValue& value) noexcept {
  const std::size_t scalar = value.index() % kScalarCount;
  // The alternatives follow the type ids but for the array, which has none of its own.
  constexpr auto kArray = static_cast<std::size_t>(GgufType::kArray);
  return static_cast<GgufType>(scalar < kArray ? scalar : scalar + 1);
}

GgufType type_of(const GgufValue& value) noexcept {
  return value.index() < kScalarCount ? element_type_of(value) : GgufType::kArray;
}

std::string describe_type(const GgufValue& value) {
  const std::string element(to_string(element_type_of(value)));
  return type_of(value) == GgufType::kArray ? "array of " + element : element;
}

void GgufMetadata::set(std::string key, GgufValue value) {
  if (key.empty()) throw ArgumentError("GgufMetadata: expected a key, got an empty one");
  const auto [found, added] = index_.emplace(key, pairs_.size());
  if (added) {
    pairs_.emplace_back(std::move(key), std::move(value));
  } else {
    pairs_[found->second].second = std::move(value);
  }
}

const GgufValue* GgufMetadata::find(std::string_view key) const {
  const auto found = index_.find(key);
  return found == index_.end() ? nullptr : &pairs_[found->second].second;
}

const GgmlTypeSize* ggml_type_size(std::uint32_t id) noexcept {
  const auto found =
      std::lower_bound(kTypeSizes.begin(), kTypeSizes.end(), id,
                       [](const GgmlTypeSize& row, std::uint32_t wanted) { return row.id < wanted; });
  return found != kTypeSizes.end() && found->id == id ? &*found : nullptr;
}

std::optional<std::uint64_t> gguf_bytes(const GgmlTypeSize& type,
                                        std::span<const std::int64_t> dims) noexcept {
  const auto count = checked_count(dims);
  const std::int64_t row = dims.empty() ? 1 : dims.front();
  if (!count || row % type.block_elements != 0) return std::nullopt;
  const auto block_elements = static_cast<std::uint64_t>(type.block_elements);
  return checked_multiply(*count / block_elements, static_cast<std::uint64_t>(type.block_bytes));
}

}  // namespace qat::io
