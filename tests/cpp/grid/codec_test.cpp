// The grids against their closed formulas in double. (Equality with ggml's own code, bit for bit, is tested
// from Python, where ggml's library is at hand.)

#include <algorithm>
#include <cmath>
#include <cstring>

#include "catch.hpp"
#include "qat/grid/bf16.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/grid.hpp"
#include "rows.hpp"

namespace grid = qat::grid;
using qat::test::coded_grids;
using qat::test::kHuge;
using qat::test::kInf;
using qat::test::kNan;
using qat::test::Row;
using qat::test::uniform_grids;
using Codes = std::vector<int8_t>;

namespace {

/// Weights in a row of one block.
int64_t one_block(const grid::Grid& g) {
  return g.info().block > 0 ? g.info().block : 32;
}

Row chosen(const grid::Grid& g, const Row& w) {
  const auto n = static_cast<int64_t>(w.size());
  Row s(static_cast<size_t>(g.blocks(n) * g.params()));
  REQUIRE(g.choose(w.data(), n, s.data()) == grid::Status::kOk);
  return s;
}

Codes encoded(const grid::Grid& g, const Row& w, const Row& s) {
  Codes codes(w.size());
  g.encode(w.data(), static_cast<int64_t>(w.size()), s.data(), codes.data());
  return codes;
}

std::vector<uint8_t> mask_of(const grid::Grid& g, const Row& w, const Row& s) {
  std::vector<uint8_t> mask(w.size());
  g.in_range(w.data(), static_cast<int64_t>(w.size()), s.data(), mask.data());
  return mask;
}

/// Where the formula puts w on the code axis before rounding: w / s, or (w - m) / s.
double position(const Row& s, double w) {
  return (w - (s.size() > 1 ? static_cast<double>(s[1]) : 0.0)) / s[0];
}

double scale_by_formula(std::string_view name, const Row& w) {
  const auto [low, high] = std::minmax_element(w.begin(), w.end());
  const float signed_largest =
      *std::max_element(w.begin(), w.end(), [](float a, float b) { return std::abs(a) < std::abs(b); });
  const double largest = std::abs(static_cast<double>(signed_largest));
  if (name == "q4_0") return static_cast<double>(signed_largest) / -8;
  if (name == "q4_1") return (static_cast<double>(*high) - static_cast<double>(*low)) / 15;
  if (name == "q5_0") return static_cast<double>(signed_largest) / -16;
  if (name == "q5_1") return (static_cast<double>(*high) - static_cast<double>(*low)) / 31;
  if (name == "q8_0") return largest / 127;
  if (name == "q2_0" || name == "tq1_0" || name == "tq2_0") return largest;
  return largest / ((std::exp2(grid::find(name).info().bits) - 1) / 2);
}

}  // namespace

TEST_CASE("scales follow the consumer's formula") {
  std::mt19937 generator(4);
  for (const std::string_view name : uniform_grids()) {
    const grid::Grid& g = grid::find(name);
    for (int i = 0; i < 200; ++i) {
      const Row w = qat::test::random_row(generator, one_block(g), i % 20 - 10);
      const Row s = chosen(g, w);
      // float32 rounds the subtraction and the division once each: 2 * 2^-24.
      REQUIRE(s[0] == Approx(scale_by_formula(name, w)).epsilon(1.2e-7));
      if (s.size() > 1) REQUIRE(s[1] == *std::min_element(w.begin(), w.end()));
    }
  }
}

TEST_CASE("a code is the nearest one, and decodes by the formula with the stored scale") {
  std::mt19937 generator(5);
  for (const std::string_view name : uniform_grids()) {
    const grid::Grid& g = grid::find(name);
    const grid::Info& info = g.info();
    const int64_t n = one_block(g);
    for (int i = 0; i < 300; ++i) {
      const Row w = qat::test::random_row(generator, n, i % 20 - 10);
      const Row s = chosen(g, w);
      const Codes codes = encoded(g, w, s);
      Row stored(s.size());
      Row w_hat(w.size());
      REQUIRE(g.store(s.data(), n, stored.data()) == grid::Status::kOk);
      g.decode(codes.data(), n, stored.data(), w_hat.data());
      for (size_t j = 0; j < w.size(); ++j) {
        const double exact = std::clamp<double>(position(s, w[j]), info.code_min, info.code_max);
        // 128 * 2^-23 covers the float32 rounding of the position itself.
        REQUIRE(std::abs(codes[j] - exact) <= 0.5 + 2e-5);
        // The product is exact in double and rounded once; a sum with a minimum is rounded once, of an exact
        // product.
        const double offset = stored.size() > 1 ? stored[1] : 0.0F;
        REQUIRE(w_hat[j] == static_cast<float>(static_cast<double>(codes[j]) * stored[0] + offset));
      }
    }
  }
}

TEST_CASE("stored scales are what the file's type holds") {
  for (const std::string_view name :
       {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_0", "q1_0", "tq1_0", "tq2_0"}) {
    const grid::Grid& g = grid::find(name);
    const int64_t n = one_block(g);
    Row s = qat::test::filled(g.params(), 0.1F);
    Row stored(s.size());
    REQUIRE(g.store(s.data(), n, stored.data()) == grid::Status::kOk);
    for (const float value : stored) REQUIRE(value == grid::f16_value(0x2e66));
    s.back() = std::nextafter(65520.0F, 0.0F);
    REQUIRE(g.store(s.data(), n, stored.data()) == grid::Status::kOk);
    REQUIRE(stored.back() == 65504.0F);
    for (const float beyond : {65520.0F, -65520.0F, kInf}) {
      s.back() = beyond;
      REQUIRE(g.store(s.data(), n, stored.data()) == grid::Status::kOverflow);
    }
    s.back() = kNan;
    REQUIRE(g.store(s.data(), n, stored.data()) == grid::Status::kNotFinite);
  }
}

TEST_CASE("a scale of the integer grids is float32 and keeps every level finite, in bfloat16 too") {
  for (const std::string_view name : uniform_grids()) {
    if (!name.starts_with("int")) continue;
    const grid::Grid& g = grid::find(name);
    const int64_t n = one_block(g);
    const auto lowest = static_cast<int8_t>(g.info().code_min);
    const float limit = grid::kBf16Max / -static_cast<float>(lowest);
    float stored = 0;
    REQUIRE(g.store(&limit, n, &stored) == grid::Status::kOk);
    REQUIRE(stored == limit);
    const Codes codes(static_cast<size_t>(n), lowest);
    Row w_hat(codes.size());
    g.decode(codes.data(), n, &stored, w_hat.data());
    REQUIRE(w_hat == Row(codes.size(), -grid::kBf16Max));
    const float beyond = std::nextafter(limit, kInf);
    REQUIRE(g.store(&beyond, n, &stored) == grid::Status::kOverflow);
    REQUIRE(g.store(&kNan, n, &stored) == grid::Status::kNotFinite);
  }
}

TEST_CASE("compressed-tensors rounds ties to even and replaces a zero scale by float32's epsilon") {
  const grid::Grid& g = grid::find("int4_channel");
  const Row w{7.5F, 0.5F, 1.5F, 2.5F, -0.5F, -1.5F, -2.5F, -7.5F, 6.5F, 7.0F};
  const Row s = chosen(g, w);
  REQUIRE(s[0] == 1.0F);
  REQUIRE(encoded(g, w, s) == Codes{7, 0, 2, 2, 0, -2, -2, -8, 6, 7});
  for (const float zero : {0.0F, -0.0F, 0x1p-149F}) {  // the last: 2^-149 / 7.5 underflows to 0
    const Row row = qat::test::filled(9, zero);
    REQUIRE(chosen(g, row)[0] == 0x1p-23F);
    Row w_hat(9, 1.0F);
    REQUIRE(g.fake_quantize(row.data(), 9, w_hat.data()) == grid::Status::kOk);
    for (const float value : w_hat) REQUIRE((value == 0.0F && !std::signbit(value)));
  }
}

TEST_CASE("each group of a row has a scale of its own") {
  for (const std::string_view name : {"int4_g32", "int3_g64", "int2_g128", "int8_g256"}) {
    const grid::Grid& g = grid::find(name);
    const int64_t block = g.info().block;
    const auto half_range = static_cast<float>((1 << g.info().bits) - 1) / 2.0F;
    Row w = qat::test::filled(3 * block, 0.0F);
    w[static_cast<size_t>(block) - 1] = half_range;       // the last weight of the first group
    w[static_cast<size_t>(block)] = -0.25F * half_range;  // the first one of the second
    const Row s = chosen(g, w);
    REQUIRE(s == Row{1.0F, 0.25F, 0x1p-23F});
    const Codes codes = encoded(g, w, s);
    Codes expected(w.size(), 0);
    // The clamp comes first: 7.5 becomes 7, while -7.5 stays a tie, which goes to -8.
    expected[static_cast<size_t>(block) - 1] = static_cast<int8_t>(g.info().code_max);
    expected[static_cast<size_t>(block)] = static_cast<int8_t>(g.info().code_min);
    REQUIRE(codes == expected);
  }
}

TEST_CASE("the four functions in turn are fake_quantize") {
  std::mt19937 generator(6);
  for (const std::string_view name : coded_grids()) {
    const grid::Grid& g = grid::find(name);
    const int64_t n = 3 * one_block(g);
    for (int exponent = -150; exponent <= qat::test::most_exponent(name); exponent += 3) {
      const Row w = qat::test::random_row(generator, n, exponent);
      const Row s = chosen(g, w);
      const Codes codes = encoded(g, w, s);
      Row stored = s;
      REQUIRE(g.store(stored.data(), n, stored.data()) == grid::Status::kOk);  // aliasing is allowed
      Row by_parts(w.size());
      Row at_once(w.size());
      g.decode(codes.data(), n, stored.data(), by_parts.data());
      REQUIRE(g.fake_quantize(w.data(), n, at_once.data()) == grid::Status::kOk);
      REQUIRE(std::memcmp(by_parts.data(), at_once.data(), w.size() * sizeof(float)) == 0);
    }
  }
}

TEST_CASE("any learned scale gives legal codes") {
  std::mt19937 generator(7);
  const Row scales{0.0F,   -0.0F,     1e-3F,      -1e-3F,    1.0F,     1e30F,
                   -1e30F, 0x1p-149F, -0x1p-149F, 0x1p-128F, 0x1p-120F};
  for (const std::string_view name : coded_grids()) {
    const grid::Grid& g = grid::find(name);
    Row w = qat::test::random_row(generator, one_block(g), 0);
    w[5] = kHuge;
    w[6] = -kHuge;
    for (const float scale : scales) {
      const Row s = qat::test::filled(g.params(), scale);
      for (const int8_t code : encoded(g, w, s)) {
        REQUIRE(code >= g.info().code_min);
        REQUIRE(code <= g.info().code_max);
      }
    }
  }
}

TEST_CASE("a learned scale saturates at both ends, whatever its sign") {
  const Row w{100.0F, -100.0F, 3.0F, -3.0F};
  Row block = qat::test::filled(32, 0.0F);
  std::copy(w.begin(), w.end(), block.begin());
  for (const std::string_view name : {"q4_0", "int4_channel"}) {
    const Codes codes = encoded(grid::find(name), block, {1.0F});
    REQUIRE(Codes(codes.begin(), codes.begin() + 4) == Codes{7, -8, 3, -3});
    const Codes mirrored = encoded(grid::find(name), block, {-1.0F});
    REQUIRE(Codes(mirrored.begin(), mirrored.begin() + 4) == Codes{-8, 7, -3, 3});
  }
  const Codes wide = encoded(grid::find("q8_0"), block, {0.5F});
  REQUIRE(Codes(wide.begin(), wide.begin() + 4) == Codes{127, -128, 6, -6});
  Row ternary = qat::test::filled(64, 0.0F);
  std::copy(w.begin(), w.end(), ternary.begin());
  const Codes two_bits = encoded(grid::find("q2_0"), ternary, {-3.0F});
  REQUIRE(Codes(two_bits.begin(), two_bits.begin() + 4) == Codes{-1, 2, -1, 1});
  const Codes offset = encoded(grid::find("q4_1"), block, {1.0F, -2.0F});
  REQUIRE(Codes(offset.begin(), offset.begin() + 4) == Codes{15, 0, 5, 0});
}

TEST_CASE("in_range is the code range, borders inside") {
  const auto first = [&](std::string_view name, const Row& s, const Row& head) {
    Row w = qat::test::filled(one_block(grid::find(name)), 0.0F);
    std::copy(head.begin(), head.end(), w.begin());
    const std::vector<uint8_t> mask = mask_of(grid::find(name), w, s);
    return std::vector<uint8_t>(mask.begin(), mask.begin() + static_cast<int64_t>(head.size()));
  };
  using Mask = std::vector<uint8_t>;
  REQUIRE(first("q4_0", {2.0F}, {14.0F, 14.1F, -16.0F, -16.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("q4_0", {-2.0F}, {-14.0F, -14.1F, 16.0F, 16.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("q4_1", {1.0F, -3.0F}, {-3.0F, -3.1F, 12.0F, 12.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("q5_0", {2.0F}, {30.0F, 30.1F, -32.0F, -32.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("q5_1", {1.0F, -3.0F}, {-3.0F, -3.1F, 28.0F, 28.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("q1_0", {-2.0F}, {2.0F, 2.1F, -2.0F, -2.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("tq1_0", {-2.0F}, {2.0F, 2.1F, -2.0F, -2.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("tq2_0", {-2.0F}, {2.0F, 2.1F, -4.0F, -4.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("mxfp4", {2.0F}, {12.0F, 12.1F, -12.0F, -12.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("nvfp4", {2.0F}, {12.0F, 12.1F, -12.0F, -12.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("q2_0", {1.0F}, {2.0F, 2.1F, -1.0F, -1.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("q2_0", {-1.0F}, {-2.0F, -2.1F, 1.0F, 1.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("q8_0", {1.0F}, {127.0F, 127.1F, -128.0F, -128.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("int2_channel", {1.0F}, {1.0F, 1.1F, -2.0F, -2.1F}) == Mask{1, 0, 1, 0});
  REQUIRE(first("int3_g64", {1.0F}, {3.0F, 3.1F, -4.0F, -4.1F}) == Mask{1, 0, 1, 0});
  for (const std::string_view name : coded_grids()) {
    REQUIRE(first(name, qat::test::filled(grid::find(name).params(), 0.0F), {1.0F, -1.0F, kHuge, -kHuge}) ==
            Mask{1, 1, 1, 1});
  }
}

TEST_CASE("the weight that a ggml scale was chosen from is inside its range") {
  std::mt19937 generator(8);
  for (const std::string_view name : {"q4_1", "q5_1", "q8_0", "q2_0", "tq1_0", "tq2_0"}) {
    const grid::Grid& g = grid::find(name);
    for (int i = 0; i < 2000; ++i) {
      const Row w = qat::test::random_row(generator, one_block(g), 0);
      const std::vector<uint8_t> mask = mask_of(g, w, chosen(g, w));
      REQUIRE(std::count(mask.begin(), mask.end(), 1) == one_block(g));  // these rules span the whole block
    }
  }
}

TEST_CASE("rows that no grid can hold are refused by choose and fake_quantize") {
  for (const std::string_view name : qat::grid::names()) {
    const grid::Grid& g = grid::find(name);
    constexpr int64_t kWidth = 256;  // the longest block
    Row s(static_cast<size_t>(g.blocks(kWidth) * g.params()) + 1);
    Row out(kWidth);
    std::vector<uint16_t> half(kWidth);
    for (const float bad : {kInf, -kInf, kNan}) {
      Row w = qat::test::filled(kWidth, 1.0F);
      w[17] = bad;
      REQUIRE(g.choose(w.data(), kWidth, s.data()) == grid::Status::kNotFinite);
      REQUIRE(g.fake_quantize(w.data(), kWidth, out.data()) == grid::Status::kNotFinite);
      REQUIRE(g.fake_quantize_bf16(w.data(), kWidth, half.data()) == grid::Status::kNotFinite);
    }
  }
}

TEST_CASE("the border of what scales hold, in weights") {
  struct Border {
    const char* name;
    float fits;
    float beyond;
  };
  for (const Border& b : {Border{"q4_0", 8 * 65519.0F, 8 * 65520.0F},
                          Border{"q8_0", 127 * 65519.0F, 127 * 65520.0F}, Border{"q4_1", 65519.0F, 65520.0F},
                          Border{"q4_1", -65519.0F, -65520.0F}, Border{"q2_0", 65519.0F, -65520.0F}}) {
    const grid::Grid& g = grid::find(b.name);
    const int64_t n = one_block(g);
    Row out(static_cast<size_t>(n));
    INFO(b.name);
    REQUIRE(g.fake_quantize(qat::test::filled(n, b.fits).data(), n, out.data()) == grid::Status::kOk);
    REQUIRE(g.fake_quantize(qat::test::filled(n, b.beyond).data(), n, out.data()) == grid::Status::kOverflow);
  }
  Row wide = qat::test::filled(32, kHuge);
  wide[1] = -kHuge;  // max - min is infinite
  Row out(32);
  REQUIRE(grid::find("q4_1").fake_quantize(wide.data(), 32, out.data()) == grid::Status::kOverflow);
}

TEST_CASE("float grids round each value, and refuse what their type cannot hold") {
  const Row w{0.1F, -65504.0F, 1e-9F, -0.0F, 65519.0F};
  Row out(w.size());
  REQUIRE(grid::find("f32").fake_quantize(w.data(), 5, out.data()) == grid::Status::kOk);
  REQUIRE(out == w);
  REQUIRE(grid::find("f16").fake_quantize(w.data(), 5, out.data()) == grid::Status::kOk);
  REQUIRE(out == Row{grid::f16_value(0x2e66), -65504.0F, 0.0F, 0.0F, 65504.0F});
  REQUIRE(std::signbit(out[3]));
  REQUIRE(grid::find("bf16").fake_quantize(w.data(), 5, out.data()) == grid::Status::kOk);
  REQUIRE(out ==
          Row{grid::bf16_value(0x3dcd), -65536.0F, grid::bf16_value(grid::bf16_bits(1e-9F)), 0.0F, 65536.0F});

  std::vector<uint16_t> half(1);
  REQUIRE(grid::find("f16").fake_quantize(Row{65520.0F}.data(), 1, out.data()) == grid::Status::kOverflow);
  REQUIRE(grid::find("f16").choose(Row{65520.0F}.data(), 1, nullptr) == grid::Status::kOverflow);
  REQUIRE(grid::find("bf16").fake_quantize(&kHuge, 1, out.data()) == grid::Status::kOverflow);
  REQUIRE(grid::find("f32").fake_quantize(&kHuge, 1, out.data()) == grid::Status::kOk);
  REQUIRE(grid::find("f32").fake_quantize_bf16(&kHuge, 1, half.data()) == grid::Status::kOverflow);
  REQUIRE(grid::find("f16").fake_quantize_bf16(Row{0.1F}.data(), 1, half.data()) == grid::Status::kOk);
  REQUIRE(half[0] == grid::bf16_bits(grid::f16_value(0x2e66)));
  REQUIRE(mask_of(grid::find("f16"), w, {}) == std::vector<uint8_t>(5, 1));
}
