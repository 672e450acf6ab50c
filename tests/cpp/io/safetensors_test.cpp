#include "qat/io/safetensors.hpp"

#include <array>

#include "catch.hpp"
#include "io/files.hpp"
#include "qat/core/error.hpp"

using Catch::Contains;
using qat::ArgumentError;
using qat::FileError;
using namespace qat::io;
using namespace qat::test;

namespace {

/// A file with this header, and `data_bytes` bytes 0, 1, 2, ... behind it.
std::string file_of(const std::string& header, std::size_t data_bytes) {
  std::string data;
  for (std::size_t i = 0; i < data_bytes; ++i) data += static_cast<char>(i);
  return le<std::uint64_t>(header.size()) + header + data;
}

const std::string kSmall =
    R"({"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[3,1],"data_offsets":[8,11]},)"
    R"("__metadata__":{"format":"pt"}})";

struct Broken {
  std::string header;
  std::size_t data_bytes;
  std::string message;
};

std::string one_tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"t":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
}

}  // namespace

TEST_CASE("a safetensors file written by hand reads as what it says") {
  const TemporaryFolder folder;
  put_file(folder / "x.safetensors", file_of(kSmall, 11));
  const SafetensorsFile file(folder / "x.safetensors");
  REQUIRE(file.tensors().size() == 2);
  const SafetensorsTensor& b = file.tensors()[0];
  REQUIRE(b.name == "b");
  REQUIRE(b.dtype == Dtype::kF32);
  REQUIRE(b.shape == std::vector<std::int64_t>{2});
  REQUIRE(b.offset == 8 + kSmall.size());
  REQUIRE(as_text(b.data) == std::string_view("\0\1\2\3\4\5\6\7", 8));
  const SafetensorsTensor& a = file.at("a");
  REQUIRE(a.shape == std::vector<std::int64_t>{3, 1});
  REQUIRE(as_text(a.data) == "\x08\x09\x0a");
  REQUIRE(file.metadata() == SafetensorsMetadata{{"format", "pt"}});
  REQUIRE(file.find("c") == nullptr);
  REQUIRE_THROWS_WITH(file.at("c"), Contains("x.safetensors") && Contains("\"c\""));
}

TEST_CASE("the safetensors writer's bytes are exactly these, whatever the order of the entries") {
  const TemporaryFolder folder;
  const std::array<float, 2> floats{1.0f, -2.0f};
  const std::array<std::uint8_t, 3> bytes{7, 8, 9};
  const std::array<std::uint16_t, 1> halves{0x3c00};
  std::vector<SafetensorsEntry> entries{
      {"z", Dtype::kU8, {3}, std::as_bytes(std::span(bytes))},
      {"b", Dtype::kF32, {2, 1}, std::as_bytes(std::span(floats))},
      {"a\"", Dtype::kBF16, {}, [&](const ByteSink& sink) { sink(std::as_bytes(std::span(halves))); }},
      {"e", Dtype::kF32, {0, 4}, std::span<const std::byte>()},
  };
  std::string header =
      R"({"__metadata__":{"a":"1","format":"pt"},"b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},)"
      R"("e":{"dtype":"F32","shape":[0,4],"data_offsets":[8,8]},"a\"":{"dtype":"BF16","shape":[],"data_offsets":[8,10]},)"
      R"("z":{"dtype":"U8","shape":[3],"data_offsets":[10,13]}})";
  header.append((8 - header.size() % 8) % 8, ' ');
  const std::string expected = le<std::uint64_t>(header.size()) + header + le(1.0f) + le(-2.0f) +
                               le<std::uint16_t>(0x3c00) + "\x07\x08\x09";
  const SafetensorsMetadata metadata{{"format", "pt"}, {"a", "1"}};
  write_safetensors(folder / "x", entries, metadata);
  REQUIRE(get_file(folder / "x") == expected);
  std::reverse(entries.begin(), entries.end());
  write_safetensors(folder / "y", entries, metadata);
  REQUIRE(get_file(folder / "y") == expected);
  const SafetensorsFile file(folder / "x");
  REQUIRE(file.tensors().size() == 4);
  REQUIRE(file.at("e").data.empty());
  REQUIRE(file.at("a\"").shape.empty());
}

TEST_CASE("a file without tensors is legal") {
  const TemporaryFolder folder;
  write_safetensors(folder / "x", {});
  REQUIRE(get_file(folder / "x") == le<std::uint64_t>(8) + "{}      ");
  REQUIRE(SafetensorsFile(folder / "x").tensors().empty());
}

TEST_CASE("every dtype of the format has a name and a width") {
  const std::vector<std::pair<std::string, int>> all{
      {"BOOL", 8},  {"U8", 8},      {"I8", 8},      {"I16", 16},    {"U16", 16}, {"F16", 16},
      {"BF16", 16}, {"I32", 32},    {"U32", 32},    {"F32", 32},    {"F64", 64}, {"I64", 64},
      {"U64", 64},  {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F4", 4}};
  for (const auto& [name, bits] : all) {
    REQUIRE(to_string(dtype_from_name(name)) == name);
    REQUIRE(bit_width(dtype_from_name(name)) == bits);
  }
  REQUIRE_THROWS_WITH(dtype_from_name("F33"), Contains("BF16") && Contains("\"F33\""));
  const TemporaryFolder folder;
  put_file(folder / "x", file_of(one_tensor("\"F4\"", "[3,2]", "[0,3]"), 3));
  REQUIRE(SafetensorsFile(folder / "x").at("t").data.size() == 3);
}

TEST_CASE("every broken file is refused with its name and what is wrong") {
  const std::string f32 = "\"F32\"";
  const std::string max = "9223372036854775807";
  const std::vector<Broken> cases{
      {"{}", 1, "expected 0 bytes of data, got 1"},
      {" {}", 0, "expected '{'"},
      {"{\"a\":", 0, "syntax error"},
      {std::string("{}\0x", 4), 0, "NUL byte at byte 2"},
      {"{} x", 0, "syntax error"},
      {"{\"\xff\":1}", 0, "syntax error"},
      {R"({"a":[[[[1]]]]})", 0, "3 levels of nesting"},
      {R"({"t":1})", 0, "\"t\": expected an object"},
      {R"({"t":{"shape":[],"data_offsets":[0,0]}})", 0, "\"dtype\""},
      {R"({"t":{"dtype":"F32","data_offsets":[0,0]}})", 0, "\"shape\""},
      {R"({"t":{"dtype":"F32","shape":[]}})", 0, "\"data_offsets\""},
      {one_tensor("\"F31\"", "[1]", "[0,4]"), 4, "got \"F31\""},
      {one_tensor("5", "[1]", "[0,4]"), 4, "a dtype"},
      {one_tensor(f32, "[-1]", "[0,4]"), 4, "shape as a list"},
      {one_tensor(f32, "[1.0]", "[0,4]"), 4, "shape as a list"},
      {one_tensor(f32, "{}", "[0,4]"), 4, "shape as a list"},
      {one_tensor(f32, "[18446744073709551615]", "[0,4]"), 4, "shape as a list"},
      {one_tensor(f32, "[1e400]", "[0,4]"), 4, "number out of range"},
      {one_tensor(f32, "[" + max + "]", "[0,4]"), 4, "countable"},
      {one_tensor(f32, "[" + max + "," + max + "]", "[0,4]"), 4, "countable"},
      {one_tensor(f32, "[4611686018427387904,4]", "[0,0]"), 0, "countable"},  // 2^64 bytes wrap to 0
      {one_tensor("\"F4\"", "[3]", "[0,1]"), 1, "countable"},
      {one_tensor(f32, "[2]", "[0,4]"), 4, "expected 8 bytes by dtype and shape, got 4"},
      {one_tensor(f32, "[1]", "[0,4,8]"), 8, "data_offsets [begin, end]"},
      {one_tensor(f32, "[1]", "[4,0]"), 4, "data_offsets [begin, end]"},
      {one_tensor(f32, "[1]", "[0,4]"), 3, "an end at 4"},
      {one_tensor(f32, "[1]", "[0,4]"), 5, "expected 4 bytes of data, got 5"},
      {one_tensor(f32, "[1]", "[4,8]"), 8, "expected data to begin at 0, got 4"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       3, "\"b\": expected data to begin at 2, got 1"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}})",
       5, "\"b\": expected data to begin at 2, got 3"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
       1, "unique keys, got \"a\" twice"},
      {R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1, "\"dtype\" twice"},
      {R"({"__metadata__":{"a":1}})", 0, "map of strings"},
      {R"({"__metadata__":"a"})", 0, "map of strings"},
  };
  const TemporaryFolder folder;
  for (const Broken& broken : cases) {
    INFO(broken.header);
    put_file(folder / "x", file_of(broken.header, broken.data_bytes));
    REQUIRE_THROWS_AS(SafetensorsFile(folder / "x"), FileError);
    REQUIRE_THROWS_WITH(SafetensorsFile(folder / "x"),
                        Contains((folder / "x").string()) && Contains(broken.message));
  }
}

TEST_CASE("a header length beyond the file or the format is refused") {
  const TemporaryFolder folder;
  for (const std::uint64_t length :
       {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{3}, ~std::uint64_t{0}}) {
    put_file(folder / "x", le(length) + "{}");
    REQUIRE_THROWS_WITH(SafetensorsFile(folder / "x"), Contains("header length: expected 2 to 2 bytes"));
  }
  put_file(folder / "x", "1234567");
  REQUIRE_THROWS_WITH(SafetensorsFile(folder / "x"), Contains("got a file of 7"));
  put_file(folder / "x", "");
  REQUIRE_THROWS_AS(SafetensorsFile(folder / "x"), FileError);
  REQUIRE_THROWS_AS(SafetensorsFile(folder / "none"), FileError);
}

TEST_CASE("the safetensors writer refuses what it cannot write, and leaves nothing behind") {
  const TemporaryFolder folder;
  const std::string four = "four";
  const auto data = as_bytes(four);
  const auto write = [&](std::vector<SafetensorsEntry> entries, SafetensorsMetadata metadata = {}) {
    write_safetensors(folder / "x", entries, metadata);
  };
  REQUIRE_THROWS_AS(write({{"t", Dtype::kF32, {2}, data}}), ArgumentError);
  REQUIRE_THROWS_WITH(write({{"t", Dtype::kF32, {2}, data}}), Contains("\"t\": expected 8 bytes, got 4"));
  REQUIRE_THROWS_WITH(write({{"t", Dtype::kU8, {2}, data}}),
                      Contains("\"t\": expected 2 bytes, got at least 4"));
  const ByteProducer twice = [&](const ByteSink& sink) {
    sink(data);
    sink(data);
  };
  REQUIRE_THROWS_WITH(write({{"t", Dtype::kF32, {1}, twice}}), Contains("expected 4 bytes, got at least 8"));
  REQUIRE_THROWS_WITH(write({{"t", Dtype::kF32, {-1}, data}}), Contains("shape"));
  REQUIRE_THROWS_WITH(write({{"t", Dtype::kF32, {1}, data}, {"t", Dtype::kF32, {1}, data}}),
                      Contains("twice"));
  REQUIRE_THROWS_WITH(write({{"__metadata__", Dtype::kF32, {1}, data}}), Contains("reserved"));
  REQUIRE_THROWS_WITH(write({{"\xff", Dtype::kF32, {1}, data}}), Contains("UTF-8") && Contains("\\xff"));
  REQUIRE_THROWS_WITH(write({}, {{"k", "\xff"}}), Contains("UTF-8"));
  const ByteProducer failing = [&](const ByteSink& sink) {
    sink(data.first(1));
    throw std::runtime_error("from the producer");
  };
  REQUIRE_THROWS_WITH(write({{"t", Dtype::kF32, {1}, failing}}), "from the producer");
  REQUIRE(folder.entries() == 0);
}
