#include "qat/train/token_data.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "train/scratch_folder.hpp"

namespace {

using qat::train::TokenData;
using qat::train::write_tokens;

std::string read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

void write(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// First tokens of the windows of batches [0, count), for text 0, 1, 2, ...
std::vector<int64_t> starts(const TokenData& data, int64_t count, int64_t batch, int64_t length,
                            int64_t seed) {
  std::vector<int64_t> result;
  for (int64_t i = 0; i < count; ++i) {
    const at::Tensor tokens = data.batch(i, batch, length, seed);
    for (int64_t b = 0; b < batch; ++b) result.push_back(tokens[b][0].item<int64_t>());
  }
  return result;
}

}  // namespace

TEST_CASE("a token file is the documented bytes and reads back") {
  const ScratchFolder folder;
  const std::string path = folder / "a.tokens";
  at::Tensor tokens = at::zeros({3}, at::kLong);
  tokens[1] = 0x01020304;
  tokens[2] = 49151;
  write_tokens(path, tokens, 0x01020305);
  const std::string expected(
      "QATTOK1\0\x05\x03\x02\x01\0\0\0\0"
      "\0\0\0\0"
      "\x04\x03\x02\x01"
      "\xff\xbf\0\0",
      28);
  REQUIRE(read(path) == expected);
  const TokenData data = TokenData::open(path);
  REQUIRE(data.size() == 3);
  REQUIRE(data.vocabulary() == 0x01020305);
  REQUIRE(data.tokens().equal(tokens));
  REQUIRE(data.fingerprint() == TokenData::from_tensor(tokens, 0x01020305).fingerprint());
  REQUIRE(data.fingerprint() != TokenData::from_tensor(tokens, 0x01020306).fingerprint());
  tokens[0] = 1;
  REQUIRE(data.fingerprint() != TokenData::from_tensor(tokens, 0x01020305).fingerprint());
}

TEST_CASE("an epoch takes every whole window once, and the next one in another order") {
  constexpr int64_t kLength = 7, kWindows = 30;
  const TokenData data = TokenData::from_tensor(at::arange(kLength * kWindows + 5), 1000);
  const auto order = starts(data, 2 * kWindows / 3, 3, kLength, 11);
  const std::set<int64_t> first(order.begin(), order.begin() + kWindows);
  const std::set<int64_t> second(order.begin() + kWindows, order.end());
  REQUIRE(first.size() == kWindows);
  REQUIRE(second == first);
  REQUIRE(*first.begin() == 0);
  REQUIRE(*first.rbegin() == (kWindows - 1) * kLength);
  REQUIRE(std::vector<int64_t>(order.begin(), order.begin() + kWindows) !=
          std::vector<int64_t>(order.begin() + kWindows, order.end()));
  REQUIRE(starts(data, 10, 3, kLength, 12) != starts(data, 10, 3, kLength, 11));
}

TEST_CASE("a batch is consecutive tokens, and batches do not depend on how they are grouped") {
  const TokenData data = TokenData::from_tensor(at::arange(100), 100);
  const at::Tensor batch = data.batch(3, 2, 9, 5);
  REQUIRE(batch.sizes() == at::IntArrayRef({2, 9}));
  for (int64_t b = 0; b < 2; ++b) {
    REQUIRE(batch[b].equal(at::arange(9) + batch[b][0]));
    REQUIRE(batch[b].equal(data.batch(6 + b, 1, 9, 5)[0]));
  }
}

TEST_CASE("the order of the data is fixed for all time") {
  // Computed once with an independent implementation of the documented generator (in the Python tests); a
  // change here would make saved runs unresumable.
  const TokenData data = TokenData::from_tensor(at::arange(10), 10);
  REQUIRE(starts(data, 10, 1, 1, 0) == std::vector<int64_t>{9, 7, 3, 6, 1, 5, 8, 4, 0, 2});
  REQUIRE(starts(data, 10, 1, 1, -3) == std::vector<int64_t>{5, 1, 9, 4, 6, 3, 7, 0, 8, 2});
}

TEST_CASE("small texts still give a permutation") {
  for (int64_t windows = 1; windows <= 17; ++windows) {
    const TokenData data = TokenData::from_tensor(at::arange(windows), 100);
    const auto order = starts(data, windows, 1, 1, windows);
    REQUIRE(std::set<int64_t>(order.begin(), order.end()).size() == static_cast<std::size_t>(windows));
  }
}

TEST_CASE("what a run reads first, each window once") {
  const TokenData data = TokenData::from_tensor(at::arange(10), 10);  // 9, 7, 3, ... as above; then again
  REQUIRE(data.first_windows(2, 2, 1, 0, 100) == std::vector<int64_t>{9, 7, 3, 6});
  REQUIRE(data.first_windows(2, 2, 1, 0, 3) == std::vector<int64_t>{9, 7, 3});
  REQUIRE(data.first_windows(1000000000, 4, 1, 0, 100) == std::vector<int64_t>{9, 7, 3, 6, 1, 5, 8, 4, 0, 2});
  REQUIRE(data.first_windows(2, 2, 1, 0, 0).empty());
  REQUIRE_THROWS_AS(data.first_windows(1, 1, 11, 0, 1), qat::ArgumentError);
}

TEST_CASE("bad token arguments are named") {
  const TokenData data = TokenData::from_tensor(at::arange(10), 10);
  REQUIRE_THROWS_WITH(data.batch(0, 1, 11, 0),
                      "TokenData::batch: text: expected at least one window of 11 tokens, got 10");
  REQUIRE_THROWS_AS(data.batch(0, 0, 2, 0), qat::ArgumentError);
  REQUIRE_THROWS_AS(data.batch(0, 1, 0, 0), qat::ArgumentError);
  REQUIRE_THROWS_AS(data.batch(-1, 1, 2, 0), qat::ArgumentError);
  REQUIRE_THROWS_AS(data.batch(std::numeric_limits<int64_t>::max(), 2, 2, 0), qat::ArgumentError);
  REQUIRE_THROWS_WITH(TokenData::from_tensor(at::arange(10), 9),
                      "TokenData::from_tensor: tokens[9]: expected an id in [0, 9), got 9");
  REQUIRE_THROWS_WITH(TokenData::from_tensor(at::arange(-1, 3), 9), Catch::Contains("tokens[0]"));
  REQUIRE_THROWS_WITH(TokenData::from_tensor(at::empty({0}, at::kLong), 9),
                      Catch::Contains("at least 1 token"));
  REQUIRE_THROWS_AS(TokenData::from_tensor(at::zeros({2, 2}, at::kLong), 9), qat::ArgumentError);
  REQUIRE_THROWS_AS(TokenData::from_tensor(at::zeros({2}, at::kInt), 9), qat::ArgumentError);
  REQUIRE_THROWS_AS(TokenData::from_tensor(at::Tensor(), 9), qat::ArgumentError);
  REQUIRE_THROWS_WITH(TokenData::from_tensor(at::arange(2), 0), Catch::Contains("vocabulary"));
}

TEST_CASE("broken token files are refused with what is wrong") {
  const ScratchFolder folder;
  const std::string path = folder / "b.tokens";
  const std::string magic("QATTOK1\0", 8), head("\x0a\0\0\0\0\0\0\0", 8), ids("\x01\0\0\0\x09\0\0\0", 8);
  const auto message = [&](const std::string& bytes) -> std::string {
    write(path, bytes);
    try {
      TokenData::open(path);
    } catch (const qat::FileError& error) {
      return error.what();
    }
    return "opened";
  };
  REQUIRE(message(magic + head + ids) == "opened");
  REQUIRE_THAT(message(""), Catch::Contains("header") && Catch::Contains(path));
  REQUIRE_THAT(message(magic + head.substr(0, 7)), Catch::Contains("header"));
  REQUIRE_THAT(message("qattok1" + std::string(1, '\0') + head + ids), Catch::Contains("header"));
  REQUIRE_THAT(message(magic + std::string(8, '\0') + ids), Catch::Contains("vocabulary"));
  REQUIRE_THAT(message(magic + std::string("\x0a\0\0\0\x01\0\0\0", 8) + ids), Catch::Contains("reserved"));
  REQUIRE_THAT(message(magic + head), Catch::Contains("multiple of 4"));
  REQUIRE_THAT(message(magic + head + ids.substr(0, 7)), Catch::Contains("7 bytes"));
  REQUIRE_THAT(message(magic + head + ids + std::string("\x0a\0\0\0", 4)),
               Catch::Contains("token 2: expected an id below the vocabulary of 10, got 10"));
  REQUIRE_THROWS_AS(TokenData::open(folder / "missing.tokens"), qat::FileError);
}

TEST_CASE("a failed write leaves the earlier file") {
  const ScratchFolder folder;
  const std::string path = folder / "c.tokens";
  write_tokens(path, at::arange(4), 10);
  const std::string before = read(path);
  REQUIRE_THROWS_AS(write_tokens(path, at::arange(4), 3), qat::ArgumentError);
  REQUIRE(read(path) == before);
  REQUIRE_THROWS_AS(write_tokens(folder / "no/such/folder.tokens", at::arange(4), 10), qat::FileError);
}
