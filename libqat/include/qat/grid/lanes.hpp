#pragma once

// What formulas are written with that are the same for one weight and for several side by side: F is float,
// or a vector of floats (Lanes of lanes_avx2.hpp), which has these functions and operators too. In either the
// results have the same bits.

#include <math.h>

#include "qat/grid/device.hpp"

namespace qat::grid {

/// Floats that one F holds.
template <class F>
inline constexpr int kLanes = static_cast<int>(sizeof(F) / sizeof(float));

/// `yes` where it holds, else `no`: for one lane what the vectorised twin does for each.
QAT_HD float select(bool which, float yes, float no) {
  return which ? yes : no;
}
/// b unless a is less.
QAT_HD float lesser(float a, float b) {
  return a < b ? a : b;
}
/// b unless a is greater.
QAT_HD float greater(float a, float b) {
  return a > b ? a : b;
}
/// Correctly rounded.
QAT_HD float square_root(float value) {
  return sqrtf(value);
}
/// Whether it holds in every lane.
QAT_HD bool everywhere(bool condition) {
  return condition;
}

/// Consecutive floats from memory.
QAT_HD void load_lanes(const float* from, float* lanes) {
  *lanes = *from;
}
/// One element per lane, `step` apart, from memory.
QAT_HD void gather_lanes(const float* from, int, float* lanes) {
  *lanes = *from;
}
/// Every lane to memory, side by side.
QAT_HD void put_lanes(float lanes, float* to) {
  *to = lanes;
}

/// Toward zero, for |value| < 2^31; never -0.
QAT_HD float truncated(float value) {
  return static_cast<float>(static_cast<int>(value));
}
/// Nearest integer, ties to even, for |value| < 2^22; never -0.
QAT_HD float nearest_even(float value) {
  return static_cast<float>(round_half_even(value));
}
/// Nearest integer, ties away from zero, for |value| < 2^22; never -0.
QAT_HD float nearest_away(float value) {
  return static_cast<float>(round_half_away(value));
}

/// `clamp` of each lane: into [low, high]; NaN becomes low.
template <class F>
QAT_HD F limited(F value, float low, float high) {
  return lesser(greater(value, F(low)), F(high));
}

}  // namespace qat::grid
