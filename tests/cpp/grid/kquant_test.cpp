// ggml's K-quants: layouts by hand, and what the row functions promise. (Equality with ggml's own code, bit
// for bit, is tested from Python, where ggml's library is at hand.)

#include <cmath>

#include "catch.hpp"
#include "qat/grid/ggml.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/stored.hpp"
#include "rows.hpp"

namespace grid = qat::grid;
using qat::test::filled;
using qat::test::kInf;
using qat::test::kNan;
using qat::test::Row;
using Bytes = std::vector<uint8_t>;
using Codes = std::vector<int8_t>;

namespace {

constexpr int64_t kBlock = 256;
constexpr std::string_view kNames[] = {"q2_k", "q3_k", "q4_k", "q5_k", "q6_k"};

/// A block as it is written: every code the least one, d (and dmin) = 1, sub-scales and sub-minima 0.
struct Block {
  explicit Block(std::string_view name)
      : grid(grid::find(name)),
        type(*grid::ggml_type_of_grid(name)),
        codes(kBlock, static_cast<int8_t>(grid.info().code_min)),
        stored(static_cast<size_t>(grid.params()), 0.0F) {
    stored[0] = 1.0F;
    if (grid.info().fields.size() == 4) stored[1] = 1.0F;
  }

  Bytes bytes() const {
    Bytes all(static_cast<size_t>(type.bytes));
    type.pack(codes.data(), stored.data(), kBlock, all.data());
    return all;
  }

  const grid::Grid& grid;
  const grid::GgmlType& type;
  Codes codes;
  Row stored;
};

/// The bits that differ between two blocks, as (first differing byte, its xor), or (-1, 0).
std::vector<std::pair<int, int>> changed(const Bytes& a, const Bytes& b) {
  std::vector<std::pair<int, int>> all;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) all.emplace_back(static_cast<int>(i), a[i] ^ b[i]);
  }
  return all;
}

Row decoded(const grid::Grid& g, const Codes& codes, const Row& stored) {
  Row w_hat(codes.size());
  g.decode(codes.data(), static_cast<int64_t>(codes.size()), stored.data(), w_hat.data());
  return w_hat;
}

Codes encoded(const grid::Grid& g, const Row& w, const Row& s) {
  Codes codes(w.size());
  g.encode(w.data(), kBlock, s.data(), codes.data());
  return codes;
}

}  // namespace

TEST_CASE("where a K-quant keeps the bits of a code") {
  struct Place {
    std::string_view name;
    size_t element;
    std::vector<std::pair<int, int>> bits;  // of the greatest code
  };
  const Place places[] = {
      {"q2_k", 0, {{16, 0x03}}},
      {"q2_k", 33, {{17, 0x0c}}},
      {"q2_k", 255, {{79, 0xc0}}},
      {"q3_k", 1, {{1, 0x01}, {33, 0x03}}},
      {"q3_k", 160, {{0, 0x20}, {64, 0x0c}}},
      {"q3_k", 255, {{31, 0x80}, {95, 0xc0}}},
      {"q4_k", 0, {{16, 0x0f}}},
      {"q4_k", 32, {{16, 0xf0}}},
      {"q4_k", 65, {{49, 0x0f}}},
      {"q4_k", 255, {{143, 0xf0}}},
      {"q5_k", 0, {{16, 0x01}, {48, 0x0f}}},
      {"q5_k", 33, {{17, 0x02}, {49, 0xf0}}},
      {"q5_k", 65, {{17, 0x04}, {81, 0x0f}}},
      {"q5_k", 255, {{47, 0x80}, {175, 0xf0}}},
      {"q6_k", 0, {{0, 0x0f}, {128, 0x03}}},
      {"q6_k", 33, {{33, 0x0f}, {129, 0x0c}}},
      {"q6_k", 64, {{0, 0xf0}, {128, 0x30}}},
      {"q6_k", 255, {{127, 0xf0}, {191, 0xc0}}},
  };
  for (const Place& place : places) {
    Block block(place.name);
    const Bytes before = block.bytes();
    block.codes[place.element] = static_cast<int8_t>(block.grid.info().code_max);
    INFO(place.name << ", element " << place.element);
    REQUIRE(changed(before, block.bytes()) == place.bits);
  }
}

TEST_CASE("where a K-quant keeps the bits of a scale") {
  struct Place {
    std::string_view name;
    size_t param;
    float value;
    std::vector<std::pair<int, int>> bits;  // against 0; 32 has the raw value 32 of 6 bits in q3_k
  };
  const Place places[] = {
      {"q2_k", 0, 2.0F, {{81, 0x7c}}},                      // 1 is 0x3c00 in half, 2 is 0x4000
      {"q2_k", 1, 2.0F, {{83, 0x7c}}},                      //
      {"q2_k", 2 + 3, 15.0F, {{3, 0x0f}}},                  //
      {"q2_k", 18 + 3, 15.0F, {{3, 0xf0}}},                 //
      {"q3_k", 0, 2.0F, {{109, 0x7c}}},                     //
      {"q3_k", 1 + 2, 31.0F, {{98, 0x0f}, {106, 0x01}}},    // 63 = 0xf | 3 << 4 against 32 = 2 << 4
      {"q3_k", 1 + 13, 31.0F, {{101, 0xf0}, {105, 0x40}}},  //
      {"q3_k", 1 + 6, -32.0F, {{106, 0x08}}},               //
      {"q4_k", 0, 2.0F, {{1, 0x7c}}},                       //
      {"q4_k", 1, 2.0F, {{3, 0x7c}}},                       //
      {"q4_k", 2 + 1, 63.0F, {{5, 0x3f}}},                  //
      {"q4_k", 2 + 5, 63.0F, {{5, 0xc0}, {13, 0x0f}}},      //
      {"q5_k", 10 + 2, 63.0F, {{10, 0x3f}}},                //
      {"q5_k", 10 + 6, 63.0F, {{10, 0xc0}, {14, 0xf0}}},    //
      {"q6_k", 0, 2.0F, {{209, 0x7c}}},                     //
      {"q6_k", 1 + 15, -128.0F, {{207, 0x80}}},             //
      {"q6_k", 1 + 4, 127.0F, {{196, 0x7f}}},
  };
  for (const Place& place : places) {
    Block block(place.name);
    const Bytes before = block.bytes();
    block.stored[place.param] = place.value;
    INFO(place.name << ", parameter " << place.param);
    REQUIRE(changed(before, block.bytes()) == place.bits);
  }
}

TEST_CASE("every bit pattern of a K-quant's block comes back, and its scales are legal") {
  std::mt19937 generator(3);
  for (const std::string_view name : kNames) {
    const grid::GgmlType& type = *grid::ggml_type_of_grid(name);
    const grid::Grid& g = grid::find(name);
    int wrong = 0;
    int illegal = 0;
    for (int i = 0; i < 2000; ++i) {
      Bytes bytes(static_cast<size_t>(type.bytes));
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
      Codes codes(kBlock);
      Row stored(static_cast<size_t>(g.params()));
      type.unpack(bytes.data(), kBlock, codes.data(), stored.data());
      Bytes back(bytes.size());
      type.pack(codes.data(), stored.data(), kBlock, back.data());
      wrong += back != bytes ? 1 : 0;
      for (size_t p = 0; p < 2; ++p) stored[p] = std::isfinite(stored[p]) ? stored[p] : 1.0F;
      illegal += grid::first_not_stored(g, stored.data()) != -1 ? 1 : 0;
    }
    INFO(name);
    REQUIRE(wrong == 0);
    REQUIRE(illegal == 0);
  }
}

TEST_CASE("a K-quant decodes by its formula") {
  Block affine("q4_k");
  affine.stored[0] = 0.5F;
  affine.stored[1] = 0.25F;
  affine.stored[2 + 1] = 3.0F;  // of the sub-block of elements 32 to 63
  affine.stored[10 + 1] = 7.0F;
  affine.codes[40] = 15;
  Row w_hat = decoded(affine.grid, affine.codes, affine.stored);
  REQUIRE(w_hat[40] == 0.5F * 3 * 15 - 0.25F * 7);
  REQUIRE(w_hat[41] == -0.25F * 7);
  REQUIRE(w_hat[31] == 0.0F);
  Block symmetric("q6_k");
  symmetric.stored[0] = -0.5F;
  symmetric.stored[1 + 2] = -128.0F;  // of elements 32 to 47
  symmetric.codes[47] = 31;
  w_hat = decoded(symmetric.grid, symmetric.codes, symmetric.stored);
  REQUIRE(w_hat[47] == 64.0F * 31);
  REQUIRE(w_hat[46] == 64.0F * -32);
}

TEST_CASE("scales of a K-quant are rounded to what its fields hold, and refused beyond") {
  struct Range {
    std::string_view name;
    float low;
    float high;
  };
  for (const Range& range : {Range{"q2_k", 0, 15}, Range{"q3_k", -32, 31}, Range{"q4_k", 0, 63},
                             Range{"q5_k", 0, 63}, Range{"q6_k", -128, 127}}) {
    const grid::Grid& g = grid::find(range.name);
    Row s = filled(g.params(), 1.0F);
    const auto store = [&](float value) {
      s.back() = value;
      Row stored(s.size());
      const grid::Status status = g.store(s.data(), kBlock, stored.data());
      return std::pair{status, stored.back()};
    };
    INFO(range.name);
    for (float value = range.low; value <= range.high; ++value) {
      REQUIRE(store(value) == std::pair{grid::Status::kOk, value});
    }
    REQUIRE(store(2.5F) == std::pair{grid::Status::kOk, 2.0F});
    REQUIRE(store(3.5F) == std::pair{grid::Status::kOk, 4.0F});
    REQUIRE_FALSE(std::signbit(store(-0.0F).second));
    REQUIRE(store(range.high + 0.49F) == std::pair{grid::Status::kOk, range.high});
    REQUIRE(store(range.low - 0.49F) == std::pair{grid::Status::kOk, range.low});
    for (const float beyond : {range.high + 0.51F, range.high + 2.0F, 1e30F}) {
      REQUIRE(store(beyond) == std::pair{grid::Status::kOk, range.high});
      REQUIRE(store(-beyond) == std::pair{grid::Status::kOk, range.low});
    }
    for (const float infinite : {kInf, -kInf}) REQUIRE(store(infinite).first == grid::Status::kOverflow);
    REQUIRE(store(kNan).first == grid::Status::kNotFinite);
    s.assign(s.size(), 1.0F);
    for (size_t field = 0; field < (g.info().fields.size() == 4 ? 2 : 1); ++field) {
      s[field] = 65520.0F;
      REQUIRE(store(1.0F).first == grid::Status::kOverflow);
      s[field] = 0.1F;
    }
    Row stored(s.size());
    REQUIRE(g.store(s.data(), kBlock, stored.data()) == grid::Status::kOk);
    REQUIRE(stored[0] != 0.1F);
    REQUIRE(stored[0] == Approx(0.1F).epsilon(0x1p-11));  // half of fp16's last bit
  }
}

TEST_CASE("a K-quant's codes are picked with the stored scales and saturate") {
  for (const std::string_view name : kNames) {
    const grid::Grid& g = grid::find(name);
    const bool affine = g.info().fields.size() == 4;
    Row s = filled(g.params(), 1.0F);
    s[0] = 1.0F + 0x1p-12F;  // rounds to 1
    Row w = filled(kBlock, 0.5F + 0x1p-13F);
    w[0] = 4e6F;  // below 2^22 steps
    w[1] = -4e6F;
    w[2] = 1.5F;
    const Codes codes = encoded(g, w, s);
    INFO(name);
    REQUIRE(codes[0] == g.info().code_max);
    REQUIRE(codes[1] == g.info().code_min);
    REQUIRE(codes[2] == 2);  // 1.5 + 1 or 1.5: a tie either way
    REQUIRE(codes[3] == (affine ? 2 : 1));
    std::vector<uint8_t> mask(kBlock);
    g.in_range(w.data(), kBlock, s.data(), mask.data());
    REQUIRE(std::vector<uint8_t>(mask.begin(), mask.begin() + 4) == std::vector<uint8_t>{0, 0, 1, 1});
  }
}

TEST_CASE("where a sub-block's scale is 0 a K-quant keeps the codes of its search") {
  // Quiet sub-blocks beside a loud one round to sub-scale 0 and decode to zeros, yet have the codes of their
  // own search.
  std::mt19937 generator(5);
  for (const std::string_view name : {"q3_k", "q6_k"}) {
    const grid::Grid& g = grid::find(name);
    Row w = qat::test::random_row(generator, kBlock, -20);
    for (size_t i = 0; i < 16; ++i) w[i] = static_cast<float>(i) - 8.0F;
    Row s(static_cast<size_t>(g.params()));
    REQUIRE(g.choose(w.data(), kBlock, s.data()) == grid::Status::kOk);
    REQUIRE(s[1 + 5] == 0.0F);
    const Codes codes = encoded(g, w, s);
    const auto from = codes.begin() + 80;
    INFO(name);
    REQUIRE(std::any_of(from, from + 16, [](int8_t code) { return code != 0; }));
    Row stored(s.size());
    REQUIRE(g.store(s.data(), kBlock, stored.data()) == grid::Status::kOk);
    REQUIRE(decoded(g, codes, stored)[80] == 0.0F);
  }
}

TEST_CASE("a search that overflows float32 is an overflow of the scale") {
  for (const std::string_view name : kNames) {
    const grid::Grid& g = grid::find(name);
    for (const float huge : {1e20F, 1e30F, qat::test::kHuge, -qat::test::kHuge}) {
      Row w = filled(kBlock, 0.0F);
      w[200] = huge;
      Row w_hat(w.size());
      INFO(name << ", " << huge);
      REQUIRE(g.fake_quantize(w.data(), kBlock, w_hat.data()) == grid::Status::kOverflow);
    }
  }
}
