// The loops of coordinate descent, against the same sums in float64.

#include "ptq/row_ops.hpp"

#include <cmath>
#include <vector>

#include "catch.hpp"
#include "random_values.hpp"

using namespace qat::ptq;

namespace {

// Sums of up to 130 x 130 products of normal numbers, each rounded to 24 bits.
constexpr double kRounding = 1e-3;

}  // namespace

TEST_CASE("rows are added and subtracted at every length") {
  for (const int64_t n : {1, 7, 8, 16, 33, 64, 70}) {
    for (const int64_t count : {0, 1, 3, 4, 5, 9}) {
      const int64_t stride = n + 3;
      const std::vector<float> h = random_values(count * stride + n, 1);
      std::vector<float> factors = random_values(count, 2), to = random_values(n, 3);
      for (int64_t i = 0; i < count; i += 3) factors[i] = 0.0F;  // whose rows are left out
      std::vector<double> expected(to.begin(), to.end());
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = 0; k < n; ++k) expected[k] -= static_cast<double>(factors[i]) * h[i * stride + k];
      }
      subtract_rows(h.data(), stride, factors.data(), count, n, to.data());
      for (int64_t k = 0; k < n; ++k) REQUIRE(std::fabs(to[k] - expected[k]) < kRounding);
    }
    const std::vector<float> from = random_values(n, 4), before = random_values(n, 5);
    std::vector<float> to = before;
    add_scaled(from.data(), n, 0.75F, to.data());
    // One product and one sum, each rounded: no processor may fuse them.
    for (int64_t k = 0; k < n; ++k) {
      const volatile float product = 0.75F * from[k];
      REQUIRE(to[k] == before[k] + product);
    }
  }
}

TEST_CASE("a row of a factor zero counts nothing even where it is not finite") {
  const std::vector<float> h{INFINITY, NAN, 1.0F, 2.0F}, factors{0.0F, 1.0F};
  std::vector<float> to{5.0F, 5.0F};
  subtract_rows(h.data(), 2, factors.data(), 2, 2, to.data());
  REQUIRE(to == std::vector<float>{4.0F, 3.0F});
}

TEST_CASE("products of vectors, and of vectors with a matrix between them") {
  for (const int64_t n : {1, 7, 8, 31, 32, 64, 65, 70, 128, 130}) {
    const int64_t stride = n + 1;
    const std::vector<float> a = random_values(n, 1), b = random_values(n, 2),
                             h = random_values(n * stride, 3);
    double product = 0.0, between = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      product += static_cast<double>(a[i]) * b[i];
      for (int64_t k = 0; k < n; ++k) between += static_cast<double>(a[i]) * h[i * stride + k] * b[k];
    }
    REQUIRE(std::fabs(dot(a.data(), b.data(), n) - product) < 1e-12 * static_cast<double>(n));
    REQUIRE(std::fabs(bilinear(a.data(), h.data(), stride, b.data(), n) - between) < kRounding);
  }
}
