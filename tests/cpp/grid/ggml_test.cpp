#include "qat/grid/ggml.hpp"

#include <cmath>
#include <vector>

#include "catch.hpp"
#include "rows.hpp"

namespace grid = qat::grid;
using Bytes = std::vector<uint8_t>;

namespace {

/// One block of weights as the grid writes it.
Bytes packed(const std::string& name, const qat::test::Row& w) {
  const grid::Grid& g = grid::find(name);
  const grid::GgmlType& type = *grid::ggml_type_of_grid(name);
  REQUIRE(static_cast<int64_t>(w.size()) == type.block);
  std::vector<float> s(static_cast<size_t>(g.blocks(type.block) * g.params()));
  std::vector<int8_t> codes(w.size());
  REQUIRE(g.choose(w.data(), type.block, s.data()) == grid::Status::kOk);
  g.encode(w.data(), type.block, s.data(), codes.data());
  REQUIRE(g.store(s.data(), type.block, s.data()) == grid::Status::kOk);
  Bytes bytes(static_cast<size_t>(type.bytes));
  type.pack(codes.data(), s.data(), type.block, bytes.data());
  return bytes;
}

/// A block: its first bytes, then `count` times byte(j).
Bytes block(std::initializer_list<int> head, int count, auto byte) {
  Bytes all(head.size() + static_cast<size_t>(count));
  size_t at = 0;
  for (const int value : head) all[at++] = static_cast<uint8_t>(value);
  for (int j = 0; j < count; ++j) all[at++] = static_cast<uint8_t>(byte(j));
  return all;
}

Bytes block(std::initializer_list<int> head, int count, int byte) {
  return block(head, count, [byte](int) { return byte; });
}

/// 0, 1, ... 31, each times step and plus offset.
qat::test::Row ramp(float step, float offset) {
  qat::test::Row row(32);
  for (size_t i = 0; i < row.size(); ++i) row[i] = static_cast<float>(i) * step + offset;
  return row;
}

}  // namespace

TEST_CASE("the table of types is ggml's") {
  struct Expected {
    uint32_t id;
    const char* name;
    const char* grid;
    int64_t block;
    int64_t bytes;
    uint32_t file_type;
  };
  const Expected all[] = {{0, "F32", "f32", 1, 4, 0},          {1, "F16", "f16", 1, 2, 1},
                          {30, "BF16", "bf16", 1, 2, 32},      {2, "Q4_0", "q4_0", 32, 18, 2},
                          {3, "Q4_1", "q4_1", 32, 20, 3},      {8, "Q8_0", "q8_0", 32, 34, 7},
                          {6, "Q5_0", "q5_0", 32, 22, 8},      {7, "Q5_1", "q5_1", 32, 24, 9},
                          {34, "TQ1_0", "tq1_0", 256, 54, 36}, {35, "TQ2_0", "tq2_0", 256, 66, 37},
                          {39, "MXFP4", "mxfp4", 32, 17, 38},  {40, "NVFP4", "nvfp4", 64, 36, 39},
                          {41, "Q1_0", "q1_0", 128, 18, 40},   {42, "Q2_0", "q2_0", 64, 18, 41}};
  for (const Expected& e : all) {
    const grid::GgmlType* type = grid::ggml_type(e.id);
    REQUIRE(type != nullptr);
    REQUIRE(type == grid::ggml_type_of_grid(e.grid));
    REQUIRE(type->name == e.name);
    REQUIRE(type->block == e.block);
    REQUIRE(type->bytes == e.bytes);
    REQUIRE(type->file_type == e.file_type);
    REQUIRE((type->pack == nullptr) == grid::find(e.grid).info().is_float);
    REQUIRE(type->bytes == grid::row_bytes(grid::find(e.grid), type->block));
  }
  REQUIRE(grid::ggml_type(4) == nullptr);
  REQUIRE(grid::ggml_type(15) == nullptr);
  REQUIRE(grid::ggml_type_of_grid("int4_channel") == nullptr);
}

TEST_CASE("a q4_0 block by hand") {
  // -16 is the largest magnitude: d = 2, codes (w / 2) + 8 rounded half up, element j beside element j + 16.
  const auto pair = [](int j) {
    const int low = static_cast<int>(std::floor((j - 16) / 2.0 + 8.5));
    const int high = std::min(15, static_cast<int>(std::floor(j / 2.0 + 8.5)));
    return low | (high << 4);
  };
  REQUIRE(packed("q4_0", ramp(1.0F, -16.0F)) == block({0x00, 0x40}, 16, pair));  // 0x4000 is 2 in half
  // All zero: ggml's m / -8 is -0, and every code is 8.
  REQUIRE(packed("q4_0", qat::test::filled(32, -0.0F)) == block({0x00, 0x80}, 16, 0x88));
}

TEST_CASE("of equal magnitudes, the first decides the sign of q4_0's scale") {
  qat::test::Row row = qat::test::filled(32, 0.0F);
  row[3] = 8.0F;
  row[20] = -8.0F;
  Bytes bytes = packed("q4_0", row);
  REQUIRE(bytes[1] == 0xbc);  // d = -1
  REQUIRE(bytes[2 + 3] == 0x80);
  REQUIRE(bytes[2 + 4] == 0xf8);  // -8 / -1 = 8, held at 7
  std::swap(row[3], row[20]);
  bytes = packed("q4_0", row);
  REQUIRE(bytes[1] == 0x3c);
  REQUIRE(bytes[2 + 3] == 0x80);
  REQUIRE(bytes[2 + 4] == 0xf8);
}

TEST_CASE("a q4_1 block by hand") {
  qat::test::Row row = ramp(0.5F, 0.0F);
  row[31] = 15.0F;  // 0, 0.5, ... 15, 15: d = 1, m = 0
  const auto pair = [](int j) { return (j + 1) / 2 | (std::min(15, (j + 17) / 2) << 4); };  // halves go up
  REQUIRE(packed("q4_1", row) == block({0x00, 0x3c, 0x00, 0x00}, 16, pair));
  // Constant: d = 0, m = -2.
  REQUIRE(packed("q4_1", qat::test::filled(32, -2.0F)) == block({0x00, 0x00, 0x00, 0xc0}, 16, 0x00));
  // Of zeros of both signs ggml keeps the first as the minimum.
  qat::test::Row zeros = qat::test::filled(32, 0.0F);
  zeros[0] = -0.0F;
  REQUIRE(packed("q4_1", zeros)[3] == 0x80);
  zeros[0] = 0.0F;
  zeros[5] = -0.0F;
  REQUIRE(packed("q4_1", zeros)[3] == 0x00);
}

TEST_CASE("a q8_0 block by hand") {
  qat::test::Row row = ramp(0.5F, -8.0F);  // ties away from zero
  row[31] = 127.0F;                        // d = 1
  const auto code = [&row](int j) { return std::lround(row[static_cast<size_t>(j)]); };
  REQUIRE(packed("q8_0", row) == block({0x00, 0x3c}, 32, code));
  REQUIRE(packed("q8_0", qat::test::filled(32, -0.0F)) == block({0x00, 0x00}, 32, 0x00));
}

TEST_CASE("a q2_0 block by hand") {
  qat::test::Row row = qat::test::filled(64, 0.0F);
  const float head[8] = {2.0F, -2.0F, 1.0F, -1.0F, 0.99F, -0.99F, 0.0F, -0.0F};  // d = 2, ties away from zero
  std::copy(head, head + 8, row.begin());
  const auto four = [](int j) { return j == 0 ? 0b00100010 : 0b01010101; };
  REQUIRE(packed("q2_0", row) == block({0x00, 0x40}, 16, four));
  REQUIRE(packed("q2_0", qat::test::filled(64, -0.0F)) == block({0x00, 0x00}, 16, 0b01010101));
}

TEST_CASE("a q5_0 block by hand") {
  // -16 is the largest magnitude: d = 1, raw codes 0 to 31, the fifth bits those of elements 16 to 31.
  const auto pair = [](int j) { return j | (j << 4); };
  REQUIRE(packed("q5_0", ramp(1.0F, -16.0F)) == block({0x00, 0x3c, 0x00, 0x00, 0xff, 0xff}, 16, pair));
  REQUIRE(packed("q5_0", qat::test::filled(32, 0.0F)) == block({0x00, 0x80, 0xff, 0xff, 0xff, 0xff}, 16, 0));
}

TEST_CASE("a q5_1 block by hand") {
  qat::test::Row row = ramp(1.0F, 0.5F);
  std::swap(row[0], row[16]);  // code 16 first, code 0 in its place
  const auto pair = [](int j) { return j | (j << 4); };
  REQUIRE(packed("q5_1", row) == block({0x00, 0x3c, 0x00, 0x38, 0x01, 0x00, 0xfe, 0xff}, 16, pair));
}

TEST_CASE("a q1_0 block by hand") {
  qat::test::Row row = qat::test::filled(128, -2.0F);
  row[0] = 2.0F;
  row[9] = -0.0F;  // as good as 0, which is not below 0
  row[127] = 4.0F;
  const auto bits = [](int j) { return j == 0 ? 0x01 : j == 1 ? 0x02 : j == 15 ? 0x80 : 0x00; };
  REQUIRE(packed("q1_0", row) == block({0x00, 0x40}, 16, bits));  // the mean is (125 + 1) * 2 + 4 = 256 / 128
  REQUIRE(packed("q1_0", qat::test::filled(128, 0.0F)) == block({0x00, 0x00}, 16, 0xff));
}

TEST_CASE("ternary blocks by hand") {
  qat::test::Row row = qat::test::filled(256, 0.0F);
  row[0] = -2.0F;  // raw 0
  row[32] = 2.0F;  // raw 2
  row[64] = 1.0F;  // a tie: raw 2
  row[131] = -1.0F;
  row[240] = 2.0F;
  Bytes two(66, 0b01010101);
  two[0] = 0b01101000;  // elements 0, 32, 64, 96
  two[32 + 3] = 0b01010100;
  two[32 + 16] = 0b10010101;  // element 240 = 128 + 16 + 96
  two[64] = 0x00;
  two[65] = 0x40;
  REQUIRE(packed("tq2_0", row) == two);

  const auto byte = [](int v) { return static_cast<uint8_t>(std::ceil(v * 256.0 / 243.0)); };
  Bytes one(54, byte(81 + 27 + 9 + 3 + 1));
  one[0] = byte(0 * 81 + 2 * 27 + 2 * 9 + 1 * 3 + 1);  // elements 0, 32, 64, 96, 128
  one[3] = byte(81 + 27 + 9 + 3 + 0);                  // element 131 = 3 + 4 * 32
  one[48] = byte(2 * 81 + 27 + 9 + 3);                 // elements 240, 244, 248, 252
  for (size_t j = 49; j < 52; ++j) one[j] = byte(81 + 27 + 9 + 3);
  one[52] = 0x00;
  one[53] = 0x40;
  REQUIRE(packed("tq1_0", row) == one);
}

TEST_CASE("an mxfp4 block by hand") {
  qat::test::Row row = qat::test::filled(32, 0.0F);
  const float head[16] = {-7.9F, 0.5F,  1.0F,  1.5F,  2.0F, 3.0F, 4.0F, 6.0F,
                          0.25F, 0.75F, 1.25F, 1.75F, 2.5F, 3.5F, 5.0F, -0.25F};  // ties to the smaller one
  std::copy(head, head + 16, row.begin());
  row[31] = -0.0F;
  Bytes expected{127};  // the power of two below 7.9 is 4, which is 2^2: the scale is 2^0
  for (const int code : {15, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 0}) {
    expected.push_back(static_cast<uint8_t>(code));
  }
  REQUIRE(packed("mxfp4", row) == expected);
  REQUIRE(packed("mxfp4", qat::test::filled(32, 0.0F)) == Bytes(17, 0));
}

TEST_CASE("an nvfp4 block by hand") {
  qat::test::Row row = qat::test::filled(64, 0.0F);
  row[0] = 6.0F;          // scale 1
  row[8] = -0.5F;         // beside it, in the high nibble
  row[31] = -12.0F;       // scale 2
  row[48] = 6 * 0x1p-9F;  // the least scale
  Bytes expected(36, 0);
  expected[0] = 0x38;
  expected[1] = 0x40;
  expected[3] = 0x01;
  expected[4] = 0x97;
  expected[4 + 8 + 7] = 0xf0;
  expected[4 + 24] = 0x07;
  REQUIRE(packed("nvfp4", row) == expected);
}

TEST_CASE("where 1/d overflows, every raw code is what ggml makes of it") {
  qat::test::Row row = qat::test::filled(32, 0.0F);
  row[0] = 0x1p-140F;
  row[1] = -0x1p-141F;
  REQUIRE(packed("q4_0", row) == block({0x00, 0x80}, 16, 0x00));  // -2^-143 is -0 in half
  REQUIRE(packed("q4_1", row) == block({0x00, 0x00, 0x00, 0x80}, 16, 0x00));
  REQUIRE(packed("q8_0", row) == block({0x00, 0x00}, 32, 0x00));
  REQUIRE(packed("q5_0", row) == block({0x00, 0x80}, 20, 0x00));
  REQUIRE(packed("q5_1", row) == block({0x00, 0x00, 0x00, 0x80}, 20, 0x00));
  row.resize(64, 0.0F);
  REQUIRE(packed("q2_0", row) == block({0x00, 0x00}, 16, 0x00));
  row.resize(256, 0.0F);  // the ternary types: weights of 0
  REQUIRE(packed("tq2_0", row) == packed("tq2_0", qat::test::filled(256, 0.0F)));
  REQUIRE(packed("tq1_0", row) == packed("tq1_0", qat::test::filled(256, 0.0F)));
}

TEST_CASE("unpacking and packing give every bit pattern back") {
  std::mt19937 generator(3);
  for (const char* name :
       {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_0", "q1_0", "tq2_0", "mxfp4", "nvfp4"}) {
    const grid::GgmlType& type = *grid::ggml_type_of_grid(name);
    const int64_t n = 2 * type.block;
    const auto scales = static_cast<size_t>(grid::find(name).blocks(n) * grid::find(name).params());
    int wrong = 0;
    for (int half = 0; half < 0x10000; ++half) {
      Bytes bytes(static_cast<size_t>(2 * type.bytes));
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
      bytes[0] = static_cast<uint8_t>(half & 255);
      bytes[1] = static_cast<uint8_t>(half >> 8);
      if (std::string_view(name) == "nvfp4") {  // ggml does not look at the sign bits of its scales
        for (const size_t j : {0, 1, 2, 3, 36, 37, 38, 39}) bytes[j] &= 0x7f;
      }
      std::vector<int8_t> codes(static_cast<size_t>(n));
      std::vector<float> stored(scales);
      type.unpack(bytes.data(), n, codes.data(), stored.data());
      Bytes back(bytes.size());
      type.pack(codes.data(), stored.data(), n, back.data());
      wrong += back != bytes ? 1 : 0;
    }
    INFO(name);
    REQUIRE(wrong == 0);
  }
}

TEST_CASE("tq1_0 unpacks what it packs, and gives every byte a meaning") {
  const grid::GgmlType& type = *grid::ggml_type_of_grid("tq1_0");
  std::mt19937 generator(4);
  std::vector<int8_t> codes(256);
  for (int i = 0; i < 1000; ++i) {
    for (int8_t& code : codes) code = static_cast<int8_t>(static_cast<int>(generator() % 3) - 1);
    const float d = -0.5F;
    Bytes bytes(54);
    type.pack(codes.data(), &d, 256, bytes.data());
    std::vector<int8_t> back(256);
    float stored = 0;
    type.unpack(bytes.data(), 256, back.data(), &stored);
    REQUIRE(back == codes);
    REQUIRE(stored == d);
  }
  for (int byte = 0; byte < 256; ++byte) {
    const Bytes bytes(54, static_cast<uint8_t>(byte));
    float stored = 0;
    type.unpack(bytes.data(), 256, codes.data(), &stored);
    for (const int8_t code : codes) REQUIRE((code >= -1 && code <= 1));
  }
}
