#include <string>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"

using qat::grid::find;

TEST_CASE("grids are listed in a fixed order and found by name") {
  const std::vector<std::string_view> expected{"f32",  "f16",          "bf16",         "q4_0",        "q4_1",
                                               "q8_0", "int8_channel", "int4_channel", "int2_channel"};
  REQUIRE(qat::grid::names() == expected);
  for (const std::string_view name : expected) {
    REQUIRE(find(name).info().name == name);
    REQUIRE(qat::grid::reference(name).info().name == name);
    REQUIRE(&find(name) == &find(name));
  }
}

TEST_CASE("an unknown grid is refused with the legal names") {
  const char* message =
      "grid: expected one of f32, f16, bf16, q4_0, q4_1, q8_0, int8_channel, int4_channel, int2_channel, got "
      "\"q4_2\"";
  REQUIRE_THROWS_AS(find("q4_2"), qat::ArgumentError);
  REQUIRE_THROWS_WITH(find("q4_2"), message);
  REQUIRE_THROWS_AS(find(""), qat::ArgumentError);
  REQUIRE_THROWS_AS(qat::grid::reference("Q4_0"), qat::ArgumentError);
}

TEST_CASE("codes fit the declared width and include zero or start at it") {
  for (const std::string_view name : qat::grid::names()) {
    const qat::grid::Info& info = find(name).info();
    if (info.is_float) continue;
    REQUIRE(info.code_max - info.code_min + 1 == 1 << info.bits);
    REQUIRE(info.code_min <= 0);
    REQUIRE(info.code_max > 0);
  }
}

TEST_CASE("block, blocks and divides") {
  REQUIRE(find("q4_0").block(576) == 32);
  REQUIRE(find("q4_0").blocks(576) == 18);
  REQUIRE(find("int4_channel").block(577) == 577);
  REQUIRE(find("int4_channel").blocks(577) == 1);
  REQUIRE(find("f16").blocks(577) == 0);
  REQUIRE(find("q4_1").params() == 2);
  REQUIRE(find("q8_0").params() == 1);
  REQUIRE(find("f32").params() == 0);
  REQUIRE(find("q8_0").divides(64));
  REQUIRE_FALSE(find("q8_0").divides(65));
  for (const std::string_view name : qat::grid::names()) {
    REQUIRE_FALSE(find(name).divides(0));
    REQUIRE_FALSE(find(name).divides(-32));
    REQUIRE(find(name).divides(32));
  }
}

TEST_CASE("row_bytes counts packed codes and stored scales") {
  using qat::grid::row_bytes;
  REQUIRE(row_bytes(find("f32"), 10) == 40);
  REQUIRE(row_bytes(find("f16"), 10) == 20);
  REQUIRE(row_bytes(find("bf16"), 10) == 20);
  REQUIRE(row_bytes(find("q4_0"), 64) == 2 * 18);
  REQUIRE(row_bytes(find("q4_1"), 64) == 2 * 20);
  REQUIRE(row_bytes(find("q8_0"), 64) == 2 * 34);
  REQUIRE(row_bytes(find("int8_channel"), 9) == 9 + 4);
  REQUIRE(row_bytes(find("int4_channel"), 9) == 5 + 4);
  REQUIRE(row_bytes(find("int2_channel"), 9) == 3 + 4);
}

TEST_CASE("a status has words for a message") {
  REQUIRE(qat::grid::to_string(qat::grid::Status::kNotFinite) == "is not finite");
  REQUIRE(qat::grid::to_string(qat::grid::Status::kOverflow) ==
          "has a value or scale beyond its stored type");
}
