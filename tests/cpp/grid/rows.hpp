#pragma once

// Rows of weights that tests share: random ones over all magnitudes, and ones built to break a quantizer.

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string_view>
#include <vector>

#include "qat/grid/grid.hpp"

namespace qat::test {

/// Every grid with codes and scales.
inline std::vector<std::string_view> coded_grids() {
  std::vector<std::string_view> coded;
  for (const std::string_view name : grid::names()) {
    if (!grid::find(name).info().is_float) coded.push_back(name);
  }
  return coded;
}

/// Those whose levels are equally far apart, w_hat = code * s (+ m), with codes that are the nearest ones and
/// a scale of a closed formula: what codec_test.cpp writes again in double.
inline std::vector<std::string_view> uniform_grids() {
  std::vector<std::string_view> uniform{"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_0", "tq1_0", "tq2_0"};
  for (const std::string_view name : coded_grids()) {
    if (name.starts_with("int") && !name.ends_with("_asym")) uniform.push_back(name);
  }
  return uniform;
}

/// Every grid with codes, and names with options that take every branch of the integer families.
inline std::vector<std::string_view> coded_grids_with_options() {
  std::vector<std::string_view> names = coded_grids();
  for (const std::string_view name :
       {"int4_g32@bf16:bf16", "int4_g32@fp16:fp16", "int4_channel@bf16_fp16", "int2_g64@pow2",
        "int3_g128@pow2:fp16", "int8_channel@fp16:bf16", "int4_channel:fp16", "int4_tensor@bf16",
        "int4_g32_asym@bf16:bf16", "int8_channel_asym@fp16:fp16", "int2_g128_asym@pow2", "mlx4_g64@bf16",
        "mlx8_g32@fp16", "mlx3_g32@bf16", "mobile4@bf16:bf16", "mobile8@fp16:fp16",
        "mobile4_g256@bf16_fp16"}) {
    names.push_back(name);
  }
  return names;
}

using Row = std::vector<float>;

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kTiny = std::numeric_limits<float>::denorm_min();
inline constexpr float kHuge = std::numeric_limits<float>::max();

/// Normal values times 2^exponent; every 7th value is a zero of either sign, and every 11th repeats an
/// earlier magnitude with the other sign.
inline Row random_row(std::mt19937& generator, int64_t n, int exponent) {
  std::normal_distribution<float> normal;
  Row row(static_cast<size_t>(n));
  for (size_t i = 0; i < row.size(); ++i) {
    row[i] = std::ldexp(normal(generator), exponent);
    if (i % 7 == 3) row[i] = generator() % 2 == 0 ? 0.0F : -0.0F;
    if (i % 11 == 10) row[i] = -row[generator() % i];
  }
  return row;
}

/// The greatest exponent of random rows (multiples of 3) that every scale of the grid can hold.
inline int most_exponent(std::string_view grid) {
  return grid == "nvfp4" ? 9 : 12;  // 448, against the 65504 of fp16
}

inline Row filled(int64_t n, float value) {
  return Row(static_cast<size_t>(n), value);
}

/// Rows of n weights that no random draw finds. Some are beyond fp16, or not finite at all.
inline std::vector<Row> adversarial_rows(int64_t n) {
  std::vector<Row> rows;
  for (const float value : {0.0F,
                            -0.0F,
                            1.0F,
                            -1.0F,
                            kTiny,
                            -kTiny,
                            0x1p-126F,
                            0x1p-128F,
                            0x1p-125F,
                            65504.0F,
                            -65504.0F,
                            65519.0F,
                            65520.0F,
                            8.0F * 65519.0F,
                            8.0F * 65520.0F,
                            127.0F * 65519.0F,
                            127.0F * 65520.0F,
                            kHuge,
                            -kHuge,
                            kInf,
                            kNan}) {
    rows.push_back(filled(n, value));
    Row one = filled(n, 0.0F);  // alone at the end, where a vector's tail is
    one.back() = value;
    rows.push_back(one);
    Row both = filled(n, value);  // equal magnitudes of both signs
    for (size_t i = 0; i < both.size(); i += 2) both[i] = -value;
    rows.push_back(both);
    Row mixed = filled(n, -0.0F);
    for (size_t i = 0; i < mixed.size(); ++i)
      mixed[i] = value * static_cast<float>(static_cast<int>(i % 33) - 16) / 16.0F;
    rows.push_back(mixed);
  }
  for (const float step :
       {1.0F, 0.5F, 0.25F, 0x1p-149F, 0x1p-140F, 0x1.8p-3F}) {  // ties: halves of every step
    Row ties = filled(n, 0.0F);
    for (size_t i = 0; i < ties.size(); ++i) ties[i] = step * (static_cast<float>(i % 32) - 16.0F) * 0.5F;
    rows.push_back(ties);
  }
  return rows;
}

}  // namespace qat::test
