#include <cmath>
#include <limits>

#include "catch.hpp"
#include "qat/grid/bf16.hpp"
#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"
#include "rows.hpp"

namespace grid = qat::grid;
using qat::test::kHuge;
using qat::test::kInf;
using qat::test::kNan;

namespace {

/// The definition of IEEE half, in double.
double half_by_definition(int bits) {
  const int exponent = (bits >> 10) & 31;
  const int fraction = bits & 1023;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

}  // namespace

TEST_CASE("every finite half has its defined value and survives the way through float32") {
  int wrong = 0;
  for (int bits = 0; bits < 0x10000; ++bits) {
    const float value = grid::f16_value(static_cast<uint16_t>(bits));
    wrong += grid::f16_bits(value) != bits ? 1 : 0;
    if ((bits & 0x7c00) != 0x7c00) wrong += static_cast<double>(value) != half_by_definition(bits) ? 1 : 0;
  }
  REQUIRE(wrong == 0);
  REQUIRE(grid::f16_value(0x7c00) == kInf);
  REQUIRE(std::isnan(grid::f16_value(0x7c01)));
  REQUIRE(std::signbit(grid::f16_value(0x8000)));
}

TEST_CASE("float32 to half rounds to nearest, ties to even, between all neighbours") {
  int wrong = 0;
  for (int low = 0; low < 0x7bff; ++low) {
    const int high = low + 1;
    // Halves are 11 bits wide, so the midpoint of two neighbours is exact in float32.
    const auto middle = static_cast<float>((half_by_definition(low) + half_by_definition(high)) / 2);
    const int even = low % 2 == 0 ? low : high;
    wrong += grid::f16_bits(middle) != even ? 1 : 0;
    wrong += grid::f16_bits(-middle) != (even | 0x8000) ? 1 : 0;
    wrong += grid::f16_bits(std::nextafter(middle, 0.0F)) != low ? 1 : 0;
    wrong += grid::f16_bits(std::nextafter(middle, kInf)) != high ? 1 : 0;
  }
  REQUIRE(wrong == 0);
}

TEST_CASE("the borders of half") {
  REQUIRE(grid::f16_bits(65504.0F) == 0x7bff);
  REQUIRE(grid::f16_bits(std::nextafter(65520.0F, 0.0F)) == 0x7bff);
  REQUIRE(grid::f16_bits(65520.0F) == 0x7c00);
  REQUIRE(grid::f16_bits(-kHuge) == 0xfc00);
  REQUIRE(grid::f16_bits(kInf) == 0x7c00);
  REQUIRE(grid::f16_bits(0x1p-25F) == 0);  // a tie with 0
  REQUIRE(grid::f16_bits(std::nextafter(0x1p-25F, 1.0F)) == 1);
  REQUIRE(grid::f16_bits(-0.0F) == 0x8000);
  REQUIRE(std::isnan(grid::f16_value(grid::f16_bits(kNan))));
  REQUIRE(std::isnan(grid::f16_value(grid::f16_bits(grid::float_of(0x7f800001)))));
}

TEST_CASE("float32 to bfloat16 rounds to nearest, ties to even") {
  int wrong = 0;
  for (uint32_t low = 0; low < 0x7f7f; ++low) {
    const uint32_t tie = (low << 16) | 0x8000U;
    const uint32_t even = low % 2 == 0 ? low : low + 1;
    wrong += grid::bf16_bits(grid::float_of(tie)) != even ? 1 : 0;
    wrong += grid::bf16_bits(grid::float_of(tie - 1)) != low ? 1 : 0;
    wrong += grid::bf16_bits(grid::float_of(tie + 1)) != low + 1 ? 1 : 0;
    wrong += grid::bf16_bits(-grid::float_of(tie)) != (even | 0x8000U) ? 1 : 0;
    wrong += grid::bf16_bits(grid::bf16_value(static_cast<uint16_t>(low))) != low ? 1 : 0;
  }
  REQUIRE(wrong == 0);
  REQUIRE(grid::bf16_bits(grid::kBf16Max) == 0x7f7f);
  REQUIRE(grid::bf16_bits(kHuge) == 0x7f80);
  REQUIRE(std::isnan(grid::bf16_value(grid::bf16_bits(kNan))));
  REQUIRE(std::isnan(grid::bf16_value(grid::bf16_bits(grid::float_of(0x7f800001)))));
}

TEST_CASE("rounding to integers agrees with the C library at and beside every tie") {
  int wrong = 0;
  for (int half = -260; half <= 260; ++half) {
    const float at = static_cast<float>(half) * 0.5F;
    for (const float value : {at, std::nextafter(at, 1e9F), std::nextafter(at, -1e9F), at + 0.3F}) {
      wrong += grid::round_half_away(value) != static_cast<int>(std::round(value)) ? 1 : 0;
      wrong += grid::round_half_even(value) != static_cast<int>(std::nearbyint(value)) ? 1 : 0;
    }
  }
  REQUIRE(wrong == 0);
}

TEST_CASE("finiteness is read from the bits") {
  REQUIRE(grid::is_finite(kHuge));
  REQUIRE_FALSE(grid::is_finite(-kInf));
  REQUIRE_FALSE(grid::is_finite(-kNan));
  const float row[3] = {1.0F, -kHuge, -0.0F};
  REQUIRE(grid::all_finite(row, 3));
  REQUIRE(grid::absolute_maximum(row, 3) == kHuge);
  REQUIRE(grid::absolute_maximum(row, 0) == 0.0F);
}
