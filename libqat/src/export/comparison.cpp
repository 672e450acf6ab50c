#include "export/comparison.hpp"

#include <array>
#include <cstdio>
#include <cstring>

namespace qat {

std::string text_of(float value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.9g", static_cast<double>(value));
  return text.data();
}

namespace {

/// Both in one scope: a name declared here hides qat::text_of, and floats would be shown as codes.
std::string shown(int8_t code) {
  return std::to_string(static_cast<int>(code));
}
std::string shown(float value) {
  return text_of(value);
}

/// By bits: 0 and -0 differ, and a NaN equals itself.
template <class T>
void compare(int64_t row, const T* expected, const T* got, int64_t count, Mismatch& mismatch) {
  if (std::memcmp(expected, got, static_cast<std::size_t>(count) * sizeof(T)) == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    if (std::memcmp(expected + i, got + i, sizeof(T)) != 0) {
      mismatch.add(row, i, shown(expected[i]), shown(got[i]));
    }
  }
}

std::string hex(const uint8_t* value, int64_t bytes) {
  std::string text = "bits 0x";
  for (int64_t i = bytes - 1; i >= 0; --i) {
    std::array<char, 3> digits{};
    std::snprintf(digits.data(), digits.size(), "%02x", value[i]);
    text += digits.data();
  }
  return text;
}

}  // namespace

void Mismatch::add(int64_t row, int64_t column, const std::string& expected, const std::string& got) {
  if (count++ > 0) return;
  first = "row " + std::to_string(row) + ", position " + std::to_string(column) + ": expected " + expected +
          ", got " + got;
}

GridComparison::GridComparison(const grid::Grid& grid, int64_t width)
    : grid_(grid), width_(width), expected_(static_cast<std::size_t>(width)), got_(expected_.size()) {}

void GridComparison::add_row(int64_t row, const int8_t* codes, const float* scales, const int8_t* file_codes,
                             const float* file_scales) {
  compare(row, codes, file_codes, width_, codes_);
  compare(row, scales, file_scales, grid_.blocks(width_) * grid_.params(), scales_);
  grid_.decode(codes, width_, scales, expected_.data());
  grid_.decode(file_codes, width_, file_scales, got_.data());
  compare(row, expected_.data(), got_.data(), width_, values_);
}

void GridComparison::report(const std::string& tensor, std::vector<Difference>& differences) const {
  qat::report(tensor, "codes", codes_, differences);
  qat::report(tensor, "scales", scales_, differences);
  qat::report(tensor, "values", values_, differences);
}

void compare_bits(int64_t row, const uint8_t* expected, const uint8_t* got, int64_t count,
                  int64_t bytes_per_value, Mismatch& mismatch) {
  const auto size = static_cast<std::size_t>(bytes_per_value);
  if (std::memcmp(expected, got, static_cast<std::size_t>(count) * size) == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t *one = expected + i * bytes_per_value, *other = got + i * bytes_per_value;
    if (std::memcmp(one, other, size) != 0) {
      mismatch.add(row, i, hex(one, bytes_per_value), hex(other, bytes_per_value));
    }
  }
}

void report(const std::string& tensor, const char* what, const Mismatch& mismatch,
            std::vector<Difference>& differences) {
  if (mismatch.count > 0) differences.push_back({tensor, what, mismatch.count, mismatch.first});
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

}  // namespace qat
