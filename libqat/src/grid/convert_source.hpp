#pragma once

// What a row on a grid offers to a conversion: its weights, and how they are spaced.

#include <cstdint>
#include <vector>

#include "qat/grid/grid.hpp"

namespace qat::grid {

/// Where the parameters of a block lie, by the names of their fields; -1 for none.
struct Roles {
  explicit Roles(const Info& info);

  int scale = -1;        ///< "scales"
  int offset = -1;       ///< "mins" or "biases"
  int zero_point = -1;   ///< "zero_points"
  int sub_scales = -1;   ///< "sub_scales": integers that multiply `scale`, one per run
  int sub_offsets = -1;  ///< "sub_mins": integers that multiply `offset`, which is then subtracted
  int runs = 1;          ///< equal parts of a block with a sub-scale each

  /// A scale and nothing else.
  bool is_plain() const noexcept { return offset < 0 && zero_point < 0 && sub_scales < 0; }
};

/// One row, taken apart.
class ConvertSource {
 public:
  ConvertSource(const Grid& grid, int64_t block, int64_t n);

  /// codes: int8[n], stored: float32[n / block, P]; both have to outlive the use of the members below.
  void read(const int8_t* codes, const float* stored);

  const Grid& grid() const noexcept { return grid_; }
  int64_t block() const noexcept { return block_; }
  const float* values() const noexcept { return values_.data(); }
  const float* stored_of(int64_t i) const noexcept { return stored_ + i / block_ * grid_.params(); }
  int code(int64_t i) const noexcept { return codes_[i]; }
  /// The distance of neighbouring codes around weight i.
  float step(int64_t i) const noexcept;
  /// What the least and the greatest code decode to in the place of weight i.
  float lowest(int64_t i) const noexcept { return lowest_[static_cast<size_t>(i)]; }
  float highest(int64_t i) const noexcept { return highest_[static_cast<size_t>(i)]; }
  /// Whether `step` and `lowest` are the same for n weights from the i-th.
  bool uniform(int64_t i, int64_t n) const noexcept;
  /// Weights that share a step.
  int64_t run() const noexcept { return block_ / roles_.runs; }

 private:
  void decode(const int8_t* codes, float* w) const;

  const Grid& grid_;
  int64_t block_;
  Roles roles_;
  const int8_t* codes_ = nullptr;
  const float* stored_ = nullptr;
  std::vector<int8_t> same_code_;
  std::vector<float> values_, lowest_, highest_;
};

}  // namespace qat::grid
