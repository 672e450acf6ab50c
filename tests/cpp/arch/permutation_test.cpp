#include <numeric>

#include "catch.hpp"
#include "qat/arch/family.hpp"
#include "qat/core/error.hpp"

using qat::ArgumentError;
using qat::arch::inverse_permutation;
using qat::arch::rope_permutation;

namespace {

/// The definition: view the rows as [heads, 2, D/2], swap the last two axes, read in order.
std::vector<std::int64_t> by_swapping_axes(std::int64_t rows, std::int64_t heads) {
  const std::int64_t half = rows / heads / 2;
  std::vector<std::int64_t> order;
  for (std::int64_t head = 0; head < heads; ++head) {
    for (std::int64_t j = 0; j < half; ++j) {
      for (std::int64_t part = 0; part < 2; ++part) order.push_back((head * 2 + part) * half + j);
    }
  }
  return order;
}

}  // namespace

TEST_CASE("the rope permutation is the swap of axes") {
  REQUIRE(rope_permutation(8, 2) == std::vector<std::int64_t>{0, 2, 1, 3, 4, 6, 5, 7});
  REQUIRE(rope_permutation(6, 1) == std::vector<std::int64_t>{0, 3, 1, 4, 2, 5});
  for (const auto& [rows, heads] :
       std::vector<std::pair<int, int>>{{576, 9}, {192, 3}, {2, 1}, {48, 4}, {0, 3}}) {
    REQUIRE(rope_permutation(rows, heads) == by_swapping_axes(rows, heads));
  }
}

TEST_CASE("the inverse undoes it, both ways round") {
  const auto forward = rope_permutation(192, 3);
  const auto back = inverse_permutation(forward);
  REQUIRE(back != forward);  // for D > 4 the swap is not its own inverse
  for (std::size_t i = 0; i < forward.size(); ++i) {
    REQUIRE(back[static_cast<std::size_t>(forward[i])] == static_cast<std::int64_t>(i));
    REQUIRE(forward[static_cast<std::size_t>(back[i])] == static_cast<std::int64_t>(i));
  }
}

TEST_CASE("rows that the heads cannot share evenly are refused") {
  REQUIRE_THROWS_AS(rope_permutation(10, 3), ArgumentError);
  REQUIRE_THROWS_AS(rope_permutation(9, 3), ArgumentError);  // an odd head has no halves
  REQUIRE_THROWS_AS(rope_permutation(8, 0), ArgumentError);
  REQUIRE_THROWS_AS(rope_permutation(8, -2), ArgumentError);
  REQUIRE_THROWS_AS(rope_permutation(-8, 2), ArgumentError);
  REQUIRE_THROWS_AS(inverse_permutation({0, 0}), ArgumentError);
  REQUIRE_THROWS_AS(inverse_permutation({0, 2}), ArgumentError);
  REQUIRE_THROWS_AS(inverse_permutation({-1, 0}), ArgumentError);
}
