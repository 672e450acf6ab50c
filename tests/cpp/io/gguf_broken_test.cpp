// Malformed GGUF files, each written by hand.

#include "catch.hpp"
#include "io/gguf_parts.hpp"
#include "qat/core/error.hpp"
#include "qat/io/gguf.hpp"

using Catch::Contains;
using qat::FileError;
using namespace qat::io;
using namespace qat::test;

namespace {

constexpr std::uint32_t kU32 = 4, kBool = 7, kString = 8, kArray = 9;
constexpr std::uint64_t kHuge = ~std::uint64_t{0};
constexpr std::int64_t kMax = INT64_MAX;

void check(const std::string& bytes, const std::string& message) {
  INFO(message);
  const TemporaryFolder folder;
  put_file(folder / "x", bytes);
  REQUIRE_THROWS_AS(GgufFile(folder / "x"), FileError);
  REQUIRE_THROWS_WITH(GgufFile(folder / "x"), Contains((folder / "x").string()) && Contains(message));
}

/// One tensor and `data` bytes behind the padded header.
std::string one_tensor(const std::vector<std::int64_t>& dims, std::uint32_t type, std::uint64_t offset,
                       std::size_t data) {
  return padded(gguf_start(1, 0) + gguf_info("t", dims, type, offset)) + std::string(data, 'd');
}

std::string with_key(const std::string& pair) {
  return padded(gguf_start(0, 1) + pair);
}

}  // namespace

TEST_CASE("the start of the file") {
  check("", "magic at byte 0: expected 4 bytes");
  check("GGU", "magic");
  check("GGML" + gguf_start(0, 0).substr(4), "expected \"GGUF\", got \"GGML\"");
  check(gguf_start(0, 0, 1), "version at byte 8: expected 2 or 3");
  check(gguf_start(0, 0, 4), "version");
  check(gguf_start(0, 0, 0x03000000), "little-endian");
  check(gguf_start(kHuge, 0), "number of tensors");
  check(gguf_start(0, kHuge), "number of keys");
  check(gguf_start(0, 1), "number of keys at byte 24: expected at most 0");
}

TEST_CASE("keys and values") {
  check(with_key(le(kHuge) + std::string(32, 'k')), "key 0");
  check(with_key(gguf_key("", kU32) + le(1u)), "key \"\"");
  check(padded(gguf_start(0, 2) + gguf_key("k", kU32) + le(1u) + gguf_key("k", kU32) + le(1u)),
        "key \"k\" at byte");
  check(with_key(gguf_key("k", 13) + std::string(32, '\0')), "value type from 0 to 12, got 13");
  check(with_key(gguf_key("k", kBool) + '\2'), "bool of 0 or 1, got 2");
  check(with_key(gguf_key("k", kString) + le(kHuge)), "key \"k\"");
  check(gguf_start(0, 1) + gguf_key("k", kU32) + "ab",
        "key \"k\" at byte 37: expected 4 bytes, got a file that ends after 2");
  check(with_key(gguf_key("k", kArray) + le(kArray) + le<std::uint64_t>(0)), "scalar or string type");
  check(with_key(gguf_key("k", kArray) + le(99u) + le<std::uint64_t>(0)),
        "scalar or string type, got type 99");
  check(with_key(gguf_key("k", kArray) + le(kU32) + le(kHuge)), "at most");
  check(with_key(gguf_key("k", kArray) + le(kU32) + le(kHuge / 4 + 1)), "at most");  // 4 * count wraps around
  check(with_key(gguf_key("k", kArray) + le(kString) + le<std::uint64_t>(1000)), "at most");
  check(with_key(gguf_key("general.alignment", kU32) + le(0u)), "power of two, got 0");
  check(with_key(gguf_key("general.alignment", kU32) + le(48u)), "power of two, got 48");
  check(with_key(gguf_key("general.alignment", kString) + gguf_string("32")), "power of two, got string");
  check(with_key(gguf_key(std::string("\xff\n", 2), 99) + std::string(32, '\0')), "key \"\\xff\\x0a\"");
}

TEST_CASE("tensors") {
  check(one_tensor({1, 1, 1, 1, 1}, 0, 0, 4), "tensor \"t\"");
  check(one_tensor({2}, 5, 0, 8), "tensor \"t\"");
  check(one_tensor({2}, 99, 0, 8), "a tensor type of ggml that libqat knows, got 99");
  check(one_tensor({33}, 2, 0, 64), "multiple of 32 as Q4_0 asks for, got [33]");
  check(one_tensor({}, 2, 0, 64), "multiple of 32 as Q4_0");
  check(one_tensor({-1}, 0, 0, 64), "got [-1]");
  check(one_tensor({kMax, kMax}, 0, 0, 64), "possible size");
  check(one_tensor({kMax}, 0, 0, 64), "possible size");  // 4 * count wraps around
  check(one_tensor({1, kMax / 4 + 1, 4}, 24, 0, 64), "possible size");
  check(one_tensor({kMax}, 24, 0, 64), "bytes of data");
  check(one_tensor({2}, 0, 32, 64), "expected offset 0, got 32");
  check(one_tensor({2}, 0, kHuge - 31, 64), "expected offset 0");
  check(one_tensor({2}, 0, 0, 7), "expected 8 bytes of data");
  check(padded(gguf_start(2, 0) + gguf_info("a", {1}, 0, 0) + gguf_info("a", {1}, 0, 32)) +
            std::string(64, 'd'),
        "tensor \"a\"");
  check(padded(gguf_start(2, 0) + gguf_info("a", {1}, 0, 0) + gguf_info("b", {1}, 0, 16)) +
            std::string(64, 'd'),
        "tensor \"b\" at byte");
  check(padded(gguf_start(1, 0) + gguf_info("", {1}, 0, 0)) + std::string(64, 'd'), "1 to 63 bytes, got 0");
  check(padded(gguf_start(1, 0) + gguf_info(std::string(64, 'n'), {1}, 0, 0)) + std::string(64, 'd'),
        "got 64");
}

TEST_CASE("an alignment as large as u32 holds is no overflow") {
  const TemporaryFolder folder;
  const std::string bytes = gguf_start(1, 1) + gguf_key("general.alignment", kU32) + le(0x80000000u);
  put_file(folder / "x", bytes + gguf_info("t", {0}, 0, 0));
  REQUIRE(GgufFile(folder / "x").tensor("t").data.empty());
  check(bytes + gguf_info("t", {1}, 0, 0), "4 bytes of data from byte 2147483648");
}
