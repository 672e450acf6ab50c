#include "qat/grid/pack.hpp"

#include <random>
#include <vector>

#include "catch.hpp"

using qat::grid::pack_codes;
using qat::grid::packed_bytes;
using qat::grid::unpack_codes;

TEST_CASE("packed sizes round up to bytes") {
  REQUIRE(packed_bytes(0, 3) == 0);
  REQUIRE(packed_bytes(1, 1) == 1);
  REQUIRE(packed_bytes(8, 3) == 3);
  REQUIRE(packed_bytes(9, 3) == 4);
  REQUIRE(packed_bytes(5, 8) == 5);
}

TEST_CASE("codes are a little-endian stream, low bits first") {
  const int8_t four[3] = {-8, 7, -1};
  uint8_t bytes[3] = {0xff, 0xff, 0xff};
  pack_codes(four, 3, 4, -8, bytes);
  REQUIRE(bytes[0] == 0xf0);
  REQUIRE(bytes[1] == 0x07);  // the unused high nibble is 0
  REQUIRE(bytes[2] == 0xff);  // nothing is written behind the row

  const int8_t two[4] = {-2, -1, 0, 1};
  pack_codes(two, 4, 2, -2, bytes);
  REQUIRE(bytes[0] == 0b11100100);

  const int8_t three[4] = {0, 1, 7, 5};  // 000 | 001 | 111 | 101, first code in the low bits
  pack_codes(three, 4, 3, 0, bytes);
  REQUIRE(bytes[0] == 0b11001000);
  REQUIRE(bytes[1] == 0b00001011);

  const int8_t eight[2] = {-128, 127};
  pack_codes(eight, 2, 8, -128, bytes);
  REQUIRE(bytes[0] == 0);
  REQUIRE(bytes[1] == 255);
}

TEST_CASE("every width and length comes back") {
  std::mt19937 generator(2);
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int code_min : {0, -(1 << (bits - 1))}) {
      if (bits == 8 && code_min == 0) continue;  // 255 is no int8
      for (int64_t n = 0; n <= 70; ++n) {
        std::vector<int8_t> codes(static_cast<size_t>(n));
        for (int8_t& code : codes) {
          code = static_cast<int8_t>(code_min + static_cast<int>(generator() % (1U << bits)));
        }
        std::vector<uint8_t> bytes(static_cast<size_t>(packed_bytes(n, bits)), 0xaa);
        pack_codes(codes.data(), n, bits, code_min, bytes.data());
        std::vector<int8_t> back(codes.size());
        unpack_codes(bytes.data(), n, bits, code_min, back.data());
        INFO("bits " << bits << ", n " << n);
        REQUIRE(back == codes);
      }
    }
  }
}
