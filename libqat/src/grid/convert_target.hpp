#pragma once

// The search for codes and parameters that give back weights which are already on some grid.

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "grid/convert_source.hpp"
#include "qat/grid/grid.hpp"

namespace qat::grid {

/// Works on one block of the target at a time.
class ConvertTarget {
 public:
  ConvertTarget(const Grid& grid, int64_t n);

  int64_t block() const noexcept { return block_; }
  int params() const noexcept { return grid_.params(); }

  /// The block that begins at weight `first`. Returns "" when codes (int8[block]) and stored (float32[P]) are
  /// written, otherwise the reason.
  std::string convert(const ConvertSource& source, int64_t first, int8_t* codes, float* stored);

 private:
  const float* values() const { return source_->values() + first_; }
  bool uniform() const { return source_->uniform(first_, block_); }

  bool attempt();
  bool attempt(float scale);
  bool attempt_offset(float scale, float offset);
  bool attempt_zero_point(float scale, float lowest);

  bool copied();
  bool from_steps();
  bool two_levels();
  bool from_values();
  bool from_largest(const std::vector<float>& sorted);

  std::string reason() const;
  std::string joined(int64_t i, int64_t n) const;
  std::string not_stored(int bad) const;
  std::string no_code(int64_t at) const;

  float& param(int index) { return params_[static_cast<size_t>(index)]; }
  float param(int index) const { return params_[static_cast<size_t>(index)]; }

  const Grid& grid_;
  int64_t block_;
  Roles roles_;
  std::vector<float> multipliers_;  ///< see from_largest
  std::vector<float> decoded_;
  const ConvertSource* source_ = nullptr;
  int64_t first_ = 0;
  int8_t* codes_ = nullptr;
  std::array<float, kMaxParams> params_{};
  std::string why_;
};

}  // namespace qat::grid
