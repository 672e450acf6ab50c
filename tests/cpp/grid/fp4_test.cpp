// The 4-bit floats: their values, the borders between them, and the scales that mxfp4 and nvfp4 can hold.

#include <algorithm>
#include <array>
#include <cmath>

#include "catch.hpp"
#include "qat/grid/e2m1.hpp"
#include "qat/grid/e4m3.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/stored.hpp"
#include "rows.hpp"

namespace grid = qat::grid;
using qat::test::kHuge;
using qat::test::kInf;
using qat::test::kNan;
using qat::test::Row;

namespace {

constexpr std::array<float, 8> kValues{0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F};

/// What `store` makes of a scale of one block.
std::pair<float, grid::Status> stored(std::string_view name, float s) {
  const grid::Grid& g = grid::find(name);
  float held = 0;
  const grid::Status status = g.store(&s, g.info().block, &held);
  return {held, status};
}

double squared_error(const grid::Grid& g, const Row& w, float s) {
  const auto n = static_cast<int64_t>(w.size());
  std::vector<int8_t> codes(w.size());
  Row w_hat(w.size());
  g.encode(w.data(), n, &s, codes.data());
  g.store(&s, n, &s);
  g.decode(codes.data(), n, &s, w_hat.data());
  double sum = 0;
  for (size_t i = 0; i < w.size(); ++i) sum += std::pow(static_cast<double>(w[i]) - w_hat[i], 2);
  return sum;
}

}  // namespace

TEST_CASE("the sixteen values of e2m1") {
  for (int code = 0; code < 8; ++code) {
    const float value = kValues[static_cast<size_t>(code)];
    REQUIRE(grid::e2m1_value(code) == value);
    REQUIRE(grid::e2m1_value(code + 8) == -value);
    REQUIRE_FALSE(std::signbit(grid::e2m1_value(code)));
    REQUIRE(std::signbit(grid::e2m1_value(code + 8)) == (code > 0));
  }
}

TEST_CASE("e2m1 codes are the nearest, ties to the smaller magnitude") {
  for (const float scale : {1.0F, 0x1p-127F, 0x1p125F, 448.0F, 7 * 0x1p-9F}) {
    for (int code = 0; code < 7; ++code) {
      const auto at = static_cast<size_t>(code);
      const float border = (kValues[at] + kValues[at + 1]) / 2 * scale;
      const float above = std::nextafter(border, kInf);
      REQUIRE(grid::e2m1_code(border, scale) == code);
      REQUIRE(grid::e2m1_code(above, scale) == code + 1);
      REQUIRE(grid::e2m1_code(-border, scale) == (code == 0 ? 0 : code + 8));
      REQUIRE(grid::e2m1_code(-above, scale) == code + 9);
    }
  }
  REQUIRE(grid::e2m1_code(-0.0F, 1.0F) == 0);
  REQUIRE(grid::e2m1_code(kHuge, kInf) == 0);
}

TEST_CASE("mxfp4 keeps powers of two whose levels are finite") {
  using grid::Status;
  REQUIRE(stored("mxfp4", 3.0F) == std::pair(4.0F, Status::kOk));  // a tie goes up
  REQUIRE(stored("mxfp4", std::nextafter(3.0F, 0.0F)) == std::pair(2.0F, Status::kOk));
  REQUIRE(stored("mxfp4", 0x1.4p-127F) == std::pair(0x1p-127F, Status::kOk));
  REQUIRE(stored("mxfp4", 0x1.8p-127F) == std::pair(0x1p-126F, Status::kOk));
  for (const float low : {0.0F, -0.0F, 0x1p-149F, -1.0F, -kInf}) {
    REQUIRE(stored("mxfp4", low) == std::pair(0x1p-127F, Status::kOk));
  }
  REQUIRE(stored("mxfp4", std::nextafter(0x1.8p125F, 0.0F)) == std::pair(0x1p125F, Status::kOk));
  for (const float high : {0x1.8p125F, kHuge, kInf})
    REQUIRE(stored("mxfp4", high).second == Status::kOverflow);
  REQUIRE(stored("mxfp4", kNan).second == Status::kNotFinite);
}

TEST_CASE("nvfp4 keeps e4m3 numbers that are not negative") {
  using grid::Status;
  REQUIRE(stored("nvfp4", 1.0625F) == std::pair(1.0F, Status::kOk));  // ties to even
  REQUIRE(stored("nvfp4", 1.1875F) == std::pair(1.25F, Status::kOk));
  REQUIRE(stored("nvfp4", 0x1p-10F) == std::pair(0.0F, Status::kOk));
  REQUIRE(stored("nvfp4", -1.0F) == std::pair(0.0F, Status::kOk));
  REQUIRE(stored("nvfp4", 464.0F) == std::pair(448.0F, Status::kOk));
  for (const float high : {465.0F, kHuge, kInf}) REQUIRE(stored("nvfp4", high).second == Status::kOverflow);
  REQUIRE(stored("nvfp4", kNan).second == Status::kNotFinite);
}

TEST_CASE("scales of a file that the formats do not allow are found") {
  const grid::Grid& mx = grid::find("mxfp4");
  const grid::Grid& nv = grid::find("nvfp4");
  for (const float legal : {0x1p-127F, 1.0F, 0x1p125F}) REQUIRE(grid::first_not_stored(mx, &legal) == -1);
  for (const float legal : {0.0F, 0x1p-9F, 448.0F}) REQUIRE(grid::first_not_stored(nv, &legal) == -1);
  for (const float bad : {0.0F, 3.0F, -1.0F, 0x1p126F, kNan, kInf}) {
    REQUIRE(grid::first_not_stored(mx, &bad) == 0);
  }
  for (const float bad : {-0.0F, -1.0F, 1.01F, 449.0F, kNan, kInf})
    REQUIRE(grid::first_not_stored(nv, &bad) == 0);
}

TEST_CASE("an all-zero block of a 4-bit float decodes to +0") {
  for (const std::string_view name : {"mxfp4", "nvfp4"}) {
    const grid::Grid& g = grid::find(name);
    const Row w = qat::test::filled(64, -0.0F);
    Row w_hat(64, 1.0F);
    REQUIRE(g.fake_quantize(w.data(), 64, w_hat.data()) == grid::Status::kOk);
    for (const float value : w_hat) REQUIRE((value == 0.0F && !std::signbit(value)));
  }
}

TEST_CASE("search finds better scales for 4-bit floats, as good as any") {
  std::mt19937 generator(21);
  std::normal_distribution<float> normal;
  for (const std::string_view name : {"mxfp4", "nvfp4"}) {
    const grid::Grid& g = grid::find(name);
    const int64_t n = g.info().block;
    double reference = 0;
    double searched = 0;
    double best = 0;
    for (int i = 0; i < 200; ++i) {
      Row w(static_cast<size_t>(n));
      for (float& value : w) value = normal(generator);
      float s = 0;
      REQUIRE(g.choose(w.data(), n, &s) == grid::Status::kOk);
      reference += squared_error(g, w, s);
      REQUIRE(g.search(w.data(), n, &s) == grid::Status::kOk);
      searched += squared_error(g, w, s);
      double least = HUGE_VAL;
      for (int byte = 1; byte < 0x7f; ++byte) {  // the powers of two are among them
        const float scale = grid::e4m3_value(static_cast<uint8_t>(byte));
        least = std::min(least, squared_error(g, w, scale));
      }
      best += least;
    }
    INFO(name << ": " << reference << " -> " << searched << ", best " << best);
    REQUIRE(searched < 0.97 * reference);
    REQUIRE(searched <= 1.01 * best);
  }
}
