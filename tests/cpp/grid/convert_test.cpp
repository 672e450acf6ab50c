// Conversion between grids: equal numbers or a reason, and no refusal where an exhaustive search finds a way.

#include "qat/grid/convert.hpp"

#include <cmath>
#include <optional>
#include <random>
#include <string>

#include "catch.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/stored.hpp"
#include "rows.hpp"

namespace grid = qat::grid;
using qat::test::coded_grids;
using qat::test::Row;
using Codes = std::vector<int8_t>;

namespace {

/// A row on a grid.
struct Quantized {
  std::string name;
  Codes codes;
  Row stored;

  const grid::Grid& grid() const { return grid::find(name); }
  int64_t size() const { return static_cast<int64_t>(codes.size()); }
  Row values() const {
    Row w(codes.size());
    grid().decode(codes.data(), size(), stored.data(), w.data());
    return w;
  }
};

Quantized empty_row(std::string_view name, int64_t n) {
  const grid::Grid& g = grid::find(name);
  return {std::string(name), Codes(static_cast<size_t>(n)),
          Row(static_cast<size_t>(g.blocks(n) * g.params()))};
}

/// Random weights in the grid's own way: legal codes and scales. Some blocks are all zero, some use few
/// codes.
Quantized random_quantized(std::mt19937& generator, std::string_view name, int64_t n) {
  Quantized row = empty_row(name, n);
  Row w = qat::test::random_row(generator, n, static_cast<int>(generator() % 6) - 4);
  for (int64_t i = 0; i < n; i += 32) {
    const auto kind = generator() % 4;
    for (int64_t j = i; j < std::min(i + 32, n); ++j) {
      float& value = w[static_cast<size_t>(j)];
      if (kind == 0) value = 0.0F;
      if (kind == 1) value = value > 0.0F ? 0.25F : -0.25F;
    }
  }
  const grid::Grid& g = row.grid();
  REQUIRE(g.choose(w.data(), n, row.stored.data()) == grid::Status::kOk);
  g.encode(w.data(), n, row.stored.data(), row.codes.data());
  REQUIRE(g.store(row.stored.data(), n, row.stored.data()) == grid::Status::kOk);
  return row;
}

/// The row on another grid, or nothing and the reason.
std::optional<Quantized> converted(const Quantized& row, std::string_view name, std::string* why = nullptr) {
  Quantized result = empty_row(name, row.size());
  grid::RowConverter converter(row.grid(), row.grid().block(row.size()), result.grid(), row.size());
  const std::string reason =
      converter.convert(row.codes.data(), row.stored.data(), result.codes.data(), result.stored.data());
  if (why != nullptr) *why = reason;
  if (!reason.empty()) return std::nullopt;
  return result;
}

bool legal(const Quantized& row) {
  const grid::Info& info = row.grid().info();
  for (const int8_t code : row.codes) {
    if (code < info.code_min || code > info.code_max) return false;
  }
  const auto params = static_cast<size_t>(row.grid().params());
  for (size_t i = 0; i < row.stored.size(); i += params) {
    if (grid::first_not_stored(row.grid(), row.stored.data() + i) >= 0) return false;
  }
  return true;
}

/// By bits; == would take 0.0F and -0.0F for equal too, but nothing else.
bool same(const Row& a, const Row& b) {
  return a == b;
}

/// Codes from -2 to 1 (or those of the grid) in turn, and these scales, one per block.
Quantized with_scales(std::string_view name, int64_t n, const Row& scales) {
  Quantized row = empty_row(name, n);
  const grid::Info& info = row.grid().info();
  for (size_t i = 0; i < row.codes.size(); ++i) {
    const int levels = info.code_max - info.code_min + 1;
    row.codes[i] = static_cast<int8_t>(info.code_min + static_cast<int>(i) % levels);
  }
  for (size_t i = 0; i < row.stored.size(); ++i) row.stored[i] = scales[i % scales.size()];
  return row;
}

}  // namespace

TEST_CASE("every pair of grids: the same numbers, or a reason that names the block") {
  std::mt19937 generator(1);
  int exact = 0;
  int refused = 0;
  for (const std::string_view from : coded_grids()) {
    const Quantized row = random_quantized(generator, from, 256);
    for (const std::string_view to : coded_grids()) {
      INFO(from << " -> " << to);
      std::string why;
      const auto result = converted(row, to, &why);
      if (!result) {
        CHECK(why.rfind("block ", 0) == 0);
        ++refused;
        continue;
      }
      ++exact;
      CHECK(legal(*result));
      CHECK(same(result->values(), row.values()));
    }
  }
  CHECK(exact > 0);
  CHECK(refused > 0);
}

TEST_CASE("a grid converts to itself without a change of codes and scales") {
  std::mt19937 generator(2);
  for (const std::string_view name : coded_grids()) {
    INFO(name);
    const Quantized row = random_quantized(generator, name, 256);
    const auto result = converted(row, name);
    REQUIRE(result);
    CHECK(result->stored == row.stored);
    CHECK(result->codes == row.codes);
  }
}

TEST_CASE("a scale that fp16 holds moves to ggml's blocks, repeated where they are smaller") {
  const Quantized group = with_scales("int4_g32", 128, {0.25F, -0.1875F, 0x1p-24F, 65504.0F});
  const auto q4_0 = converted(group, "q4_0");
  REQUIRE(q4_0);
  CHECK(q4_0->codes == group.codes);
  CHECK(q4_0->stored == group.stored);
  const auto channel = converted(with_scales("int4_channel", 96, {0.75F}), "q4_0");
  REQUIRE(channel);
  CHECK(channel->stored == Row{0.75F, 0.75F, 0.75F});
  const auto wide = converted(with_scales("int8_g128", 256, {0.5F, 3.0F}), "q8_0");
  REQUIRE(wide);
  CHECK(wide->stored == Row{0.5F, 0.5F, 0.5F, 0.5F, 3.0F, 3.0F, 3.0F, 3.0F});
}

TEST_CASE("larger blocks need equal scales") {
  const auto joined = converted(with_scales("q4_0", 128, {0.5F}), "int4_g64");
  REQUIRE(joined);
  CHECK(joined->stored == Row{0.5F, 0.5F});
  std::string why;
  CHECK_FALSE(converted(with_scales("q4_0", 128, {0.5F, 0.5F, 0.5F, 0.25F}), "int4_g64", &why));
  CHECK(why == "block 1: 64 weights of int4_g64 would share the scales 0.5 and 0.25");
}

TEST_CASE("reasons say what does not fit") {
  std::string why;
  CHECK_FALSE(converted(with_scales("int4_g32", 64, {0.5F, 0.1F}), "q4_0", &why));
  CHECK(why == "block 1: scales of q4_0 cannot hold 0.100000001 exactly");
  CHECK_FALSE(converted(with_scales("int8_g32", 32, {0.5F}), "int4_g32", &why));
  CHECK(why == "block 0: the weight -64, code -128 of int8_g32, has no code on int4_g32 with the scale 0.5");
  Quantized shifted = with_scales("q4_1", 32, {0.5F, 0.125F});
  CHECK_FALSE(converted(shifted, "int4_g32", &why));
  CHECK(why.find("has no code on int4_g32") != std::string::npos);
}

TEST_CASE("an offset that is a multiple of the scale is none") {
  const Quantized affine = with_scales("q4_1", 32, {0.5F, -4.0F});
  const auto symmetric = converted(affine, "int4_g32");
  REQUIRE(symmetric);
  CHECK(symmetric->stored == Row{0.5F});
  CHECK(symmetric->codes.front() == -8);
  const auto back = converted(*symmetric, "q4_1");
  REQUIRE(back);
  CHECK(back->stored == affine.stored);
  CHECK(back->codes == affine.codes);
}

TEST_CASE("scales of either sign, and blocks of nothing but zeros, have a place") {
  const auto negative = converted(with_scales("int2_g64", 64, {-0.5F}), "int4_g32");
  REQUIRE(negative);
  CHECK(negative->stored == Row{-0.5F, -0.5F});
  Quantized zeros = empty_row("int4_g32", 32);
  zeros.stored[0] = 0.1F;  // not exact in fp16, and without meaning here
  const auto result = converted(zeros, "q4_0");
  REQUIRE(result);
  CHECK(result->values() == Row(32, 0.0F));
}

TEST_CASE("fewer codes are enough when the block uses few") {
  Quantized row = empty_row("int8_g32", 32);
  row.stored[0] = 0.1F;
  for (size_t i = 0; i < row.codes.size(); ++i) row.codes[i] = static_cast<int8_t>(i % 2 == 0 ? 20 : -40);
  const auto result = converted(row, "int2_g32");
  REQUIRE(result);
  CHECK(same(result->values(), row.values()));
}

TEST_CASE("what is refused for q4_0, no fp16 scale of all 65536 holds") {
  std::mt19937 generator(3);
  const grid::Grid& q4_0 = grid::find("q4_0");
  int refused = 0;
  int found = 0;
  for (int trial = 0; trial < 60; ++trial) {
    const char* const sources[] = {"int4_g32", "int8_g32", "q4_1", "int2_g32"};
    Quantized row = empty_row(sources[trial % 4], 32);
    const grid::Info& info = row.grid().info();
    const int spread = 1 + trial % 17;  // how many codes the block uses
    for (int8_t& code : row.codes) {
      const int pick = static_cast<int>(generator() % static_cast<unsigned>(spread)) * (1 + trial % 3);
      code = static_cast<int8_t>(std::min(info.code_max, info.code_min + pick));
    }
    for (float& s : row.stored) {
      s = grid::f16_value(static_cast<uint16_t>(0x2800 + generator() % 0x1000 / 64 * 64));
    }
    const Row values = row.values();
    bool possible = false;
    for (uint32_t bits = 0; bits < 65536 && !possible; ++bits) {
      const float d = grid::f16_value(static_cast<uint16_t>(bits));
      possible = std::all_of(values.begin(), values.end(), [d](float v) {
        const float code = d == 0.0F ? 0.0F : std::nearbyint(v / d);
        return code >= -8.0F && code <= 7.0F && code * d == v;
      });
    }
    INFO("trial " << trial << " from " << row.name);
    CHECK(converted(row, q4_0.info().name).has_value() == possible);
    ++(possible ? found : refused);
  }
  CHECK(found > 5);
  CHECK(refused > 5);
}

TEST_CASE("int2's levels -2 to 1 are q2_0's -1 to 2 with the opposite sign") {
  const Quantized int2 = with_scales("int2_g64", 128, {0.5F, -0.75F});
  const auto q2_0 = converted(int2, "q2_0");
  REQUIRE(q2_0);
  CHECK(q2_0->stored == Row{-0.5F, 0.75F});
  CHECK(same(q2_0->values(), int2.values()));
  const auto back = converted(*q2_0, "int2_g64");
  REQUIRE(back);
  CHECK(back->stored == int2.stored);
  CHECK(back->codes == int2.codes);
}

TEST_CASE("one scale per 256 weights fits the two levels of a K-quant, with sub-scales of 1") {
  const Quantized int2 = with_scales("int2_g256", 512, {0.5F, 0.75F});
  const auto q2_k = converted(int2, "q2_k");
  REQUIRE(q2_k);
  CHECK(same(q2_k->values(), int2.values()));
  CHECK(q2_k->stored[0] == 0.5F);   // d
  CHECK(q2_k->stored[1] == 1.0F);   // dmin = 2 d
  CHECK(q2_k->stored[2] == 1.0F);   // the first sub-scale
  CHECK(q2_k->stored[18] == 1.0F);  // the first sub-minimum
  const auto back = converted(*q2_k, "int2_g256");
  REQUIRE(back);
  CHECK(back->stored == int2.stored);
  CHECK(back->codes == int2.codes);
  for (const char* name : {"q4_k", "q5_k", "q6_k", "q3_k"}) {
    INFO(name);
    CHECK(converted(int2, name));
  }
}

TEST_CASE("groups whose scales are small multiples of one another share a K-quant's block") {
  const Quantized groups = with_scales("int4_g32", 256, {0.5F, 1.0F, 7.5F, 0.5F, 31.0F, 2.0F, 1.5F, 4.0F});
  const auto q4_k = converted(groups, "q4_k");
  REQUIRE(q4_k);
  CHECK(same(q4_k->values(), groups.values()));
  const Quantized far = with_scales("int4_g32", 256, {0.5F, 1.0F, 0.75F, 1.0F, 1.0F, 1.0F, 1.0F, 1.0F});
  std::string why;
  CHECK_FALSE(converted(far, "q4_k", &why));
  CHECK(why == "block 0: sub_scales of q4_k cannot hold 1.5 exactly");
}

TEST_CASE("a K-quant's groups go where an effective scale can be stored") {
  std::mt19937 generator(4);
  const Quantized q4_k = random_quantized(generator, "q4_k", 512);
  const auto q5_k = converted(q4_k, "q5_k");
  REQUIRE(q5_k);
  CHECK(q5_k->stored == q4_k.stored);
  const Quantized q6_k = random_quantized(generator, "q6_k", 512);
  std::string why;
  CHECK_FALSE(converted(q6_k, "int8_g32", &why));  // its groups have 16 weights
  CHECK(why.find("32 weights of int8_g32 would share the scales") != std::string::npos);
}

TEST_CASE("a symmetric grid is MLX's with the bias of its least code") {
  const Quantized int4 = with_scales("int4_g32@fp16", 64, {0.75F, -0.125F});
  const auto mlx = converted(int4, "mlx4_g32");
  REQUIRE(mlx);
  CHECK(mlx->stored == Row{0.75F, -6.0F, -0.125F, 1.0F});
  CHECK(mlx->codes.front() == 0);
  CHECK(same(mlx->values(), int4.values()));
  const auto back = converted(*mlx, "int4_g32@fp16");
  REQUIRE(back);
  CHECK(back->stored == int4.stored);
  CHECK(back->codes == int4.codes);
  const auto wide = converted(with_scales("int8_g64@bf16", 64, {0.5F}), "mlx8_g64");
  REQUIRE(wide);
  CHECK(wide->stored == Row{0.5F, -64.0F});
}

TEST_CASE("MLX adds after it has rounded: a float32 scale is not exact there") {
  std::string why;
  CHECK_FALSE(converted(with_scales("int4_g32", 32, {0.1F}), "mlx4_g32", &why));
  CHECK(why.find("has no code on mlx4_g32 with the scale 0.1") != std::string::npos);
}

TEST_CASE("a bias that is a multiple of the scale is a zero point") {
  Quantized mlx = with_scales("mlx4_g32", 32, {0.5F});
  mlx.stored = {0.5F, -1.5F};  // levels 0 to 15: -3 to 12 steps
  const auto asymmetric = converted(mlx, "int4_g32_asym");
  REQUIRE(asymmetric);
  CHECK(asymmetric->stored == Row{0.5F, -5.0F});
  CHECK(asymmetric->codes.front() == -8);
  CHECK(same(asymmetric->values(), mlx.values()));
  mlx.stored = {0.5F, -1.25F};
  CHECK_FALSE(converted(mlx, "int4_g32_asym"));
}

TEST_CASE("Gemma's mobile rows go to ggml, those of two bits with the opposite sign") {
  const auto two = converted(with_scales("mobile2", 128, {0.5F}), "q2_0");
  REQUIRE(two);
  CHECK(two->stored == Row{-0.5F, -0.5F});
  const auto four = converted(with_scales("mobile4", 64, {0.5F}), "q4_0");
  REQUIRE(four);
  CHECK(four->stored == Row{0.5F, 0.5F});
  const auto tensor = converted(with_scales("int4_tensor", 64, {0.5F}), "q4_0");
  REQUIRE(tensor);
  CHECK(tensor->stored == Row{0.5F, 0.5F});
}

TEST_CASE("options in a name count: other scale grids, products rounded to the consumer's type") {
  std::mt19937 generator(5);
  const char* const names[] = {"int4_g32@bf16_fp16", "int4_g32@bf16:bf16", "int8_g64@fp16:fp16",
                               "int2_g32@pow2",      "mlx4_g32@bf16",      "mlx3_g64@fp16",
                               "int4_g64_asym@fp16"};
  int exact = 0;
  for (const char* from : names) {
    const Quantized row = random_quantized(generator, from, 256);
    for (const char* to : names) {
      INFO(from << " -> " << to);
      std::string why;
      const auto result = converted(row, to, &why);
      CHECK((result.has_value() || why.rfind("block ", 0) == 0));
      if (!result) continue;
      ++exact;
      CHECK(legal(*result));
      CHECK(same(result->values(), row.values()));
    }
    CHECK(converted(row, from));
  }
  CHECK(exact >= 7);
}
