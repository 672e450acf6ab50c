#include "qat/io/gguf.hpp"

#include <array>
#include <limits>

#include "catch.hpp"
#include "io/files.hpp"
#include "io/gguf_parts.hpp"
#include "qat/core/error.hpp"

using Catch::Contains;
using qat::ArgumentError;
using qat::FileError;
using namespace qat::io;
using namespace qat::test;

TEST_CASE("a GGUF file written by hand reads as what it says, with exact types") {
  const TemporaryFolder folder;
  const std::string bytes = small_gguf();
  put_file(folder / "x.gguf", bytes);
  const GgufFile file(folder / "x.gguf");
  REQUIRE(file.version() == 3);
  REQUIRE(file.alignment() == 32);
  REQUIRE(file.metadata().size() == 6);
  REQUIRE(file.metadata().begin()->first == "general.architecture");
  REQUIRE(file.get<std::string>("general.architecture") == "llama");
  REQUIRE(file.get<std::uint32_t>("n") == 7);
  REQUIRE(file.get<float>("eps") == 0.5f);
  REQUIRE(file.get<bool>("flag"));
  REQUIRE(file.get<std::vector<std::string>>("tokens") == std::vector<std::string>{"a", ""});
  REQUIRE(file.get<std::vector<std::int16_t>>("none").empty());
  REQUIRE(file.get_integer("n") == 7);
  REQUIRE(file.get_number("n") == 7.0);
  REQUIRE(file.get_number("eps") == 0.5);

  REQUIRE(file.tensors().size() == 2);
  const GgufTensor& matrix = file.tensor("m");
  REQUIRE(matrix.dims == std::vector<std::int64_t>{32, 2});
  REQUIRE(matrix.shape() == std::vector<std::int64_t>{2, 32});
  REQUIRE(matrix.type == 8);
  REQUIRE(as_text(matrix.data) == std::string(68, 'q'));
  REQUIRE(matrix.offset % 32 == 0);
  REQUIRE(as_text(file.tensor("v").data) == le(1.0f) + le(2.0f));
  REQUIRE(file.tensor("v").offset == matrix.offset + 96);
  REQUIRE(file.find_tensor("w") == nullptr);
}

TEST_CASE("the GGUF writer's bytes are exactly the hand-written ones") {
  const TemporaryFolder folder;
  put_file(folder / "x.gguf", small_gguf());
  const GgufFile file(folder / "x.gguf");
  std::vector<GgufEntry> entries;
  for (const GgufTensor& tensor : file.tensors()) {
    // In pieces, as an exporter does it.
    const ByteProducer pieces = [&tensor](const ByteSink& sink) {
      sink(tensor.data.first(3));
      sink(tensor.data.subspan(3));
    };
    entries.push_back({tensor.name, tensor.dims, tensor.type, pieces});
  }
  write_gguf(folder / "y.gguf", file.metadata(), entries);
  REQUIRE(get_file(folder / "y.gguf") == small_gguf());
}

TEST_CASE("every value type survives the way through a file") {
  const TemporaryFolder folder;
  const auto largest = std::numeric_limits<std::uint64_t>::max();
  const std::vector<GgufValue> values{std::uint8_t{255},
                                      std::int8_t{-1},
                                      std::uint16_t{65535},
                                      std::int16_t{-2},
                                      std::uint32_t{4000000000u},
                                      std::int32_t{-3},
                                      -0.0f,
                                      false,
                                      std::string("t\0xt", 4),
                                      largest,
                                      std::int64_t{-4},
                                      0.1,
                                      std::vector<std::uint8_t>{1},
                                      std::vector<std::int8_t>{-1},
                                      std::vector<std::uint16_t>{2},
                                      std::vector<std::int16_t>{-2},
                                      std::vector<std::uint32_t>{3, 4},
                                      std::vector<std::int32_t>{-3},
                                      std::vector<float>{0.5f},
                                      std::vector<bool>{true, false},
                                      std::vector<std::string>{"", "b"},
                                      std::vector<std::uint64_t>{largest},
                                      std::vector<std::int64_t>{-4},
                                      std::vector<double>{}};
  GgufMetadata metadata;
  for (std::size_t i = 0; i < values.size(); ++i) metadata.set(describe_type(values[i]), values[i]);
  REQUIRE(metadata.size() == 24);  // each type has a name of its own
  write_gguf(folder / "x", metadata, {});
  const GgufFile file(folder / "x");
  std::size_t i = 0;
  for (const auto& [key, value] : file.metadata()) {
    INFO(key);
    REQUIRE(value == values[i++]);
  }
  REQUIRE_THROWS_WITH(file.get_integer("u64"), Contains("u64"));  // beyond int64
  REQUIRE(file.get_integer("i8") == -1);
  REQUIRE_THROWS_AS(file.get_integer("f32"), FileError);
  REQUIRE_THROWS_AS(file.get_integer("bool"), FileError);
  REQUIRE_THROWS_AS(file.get_number("string"), FileError);
  REQUIRE_THROWS_WITH(file.get<std::uint32_t>("i32"), Contains("key \"i32\": expected u32, got i32"));
  REQUIRE_THROWS_WITH(file.get<float>("absent"), Contains("expected a key \"absent\""));
}

TEST_CASE("setting a key again replaces its value in place") {
  GgufMetadata metadata;
  metadata.set("a", std::uint32_t{1});
  metadata.set("b", std::string("x"));
  metadata.set("a", 2.0f);
  REQUIRE(metadata.size() == 2);
  REQUIRE(metadata.begin()->first == "a");
  REQUIRE(*metadata.find("a") == GgufValue(2.0f));
  REQUIRE(metadata.find("c") == nullptr);
  REQUIRE_THROWS_AS(metadata.set("", 1.0f), ArgumentError);
}

TEST_CASE("another alignment and version 2 are read") {
  const TemporaryFolder folder;
  GgufMetadata metadata;
  metadata.set("general.alignment", std::uint32_t{128});
  const std::string data = "data";
  write_gguf(folder / "x", metadata, {{"a", {1}, 0, as_bytes(data)}, {"b", {1}, 0, as_bytes(data)}});
  std::string bytes = get_file(folder / "x");
  REQUIRE(bytes.size() % 128 == 0);
  bytes[4] = 2;
  put_file(folder / "x", bytes);
  const GgufFile file(folder / "x");
  REQUIRE(file.version() == 2);
  REQUIRE(file.alignment() == 128);
  REQUIRE(file.tensor("b").offset == file.tensor("a").offset + 128);
  REQUIRE(as_text(file.tensor("b").data) == "data");
}

TEST_CASE("the padding behind the last tensor may be missing") {
  const TemporaryFolder folder;
  const std::string bytes = small_gguf();
  put_file(folder / "x", std::string_view(bytes).substr(0, bytes.size() - 24));
  REQUIRE(as_text(GgufFile(folder / "x").tensor("v").data) == le(1.0f) + le(2.0f));
  put_file(folder / "x", std::string_view(bytes).substr(0, bytes.size() - 25));
  REQUIRE_THROWS_WITH(GgufFile(folder / "x"), Contains("tensor \"v\"") && Contains("8 bytes of data"));
}

TEST_CASE("tensor types have ggml's sizes, and removed ids have none") {
  REQUIRE(ggml_type_size(0)->block_bytes == 4);
  REQUIRE(ggml_type_size(2)->name == "Q4_0");
  REQUIRE(ggml_type_size(2)->block_bytes == 18);
  REQUIRE(ggml_type_size(42)->block_elements == 64);
  for (const std::uint32_t removed : {4u, 5u, 31u, 32u, 33u, 36u, 37u, 38u, 43u, ~0u}) {
    REQUIRE(ggml_type_size(removed) == nullptr);
  }
  std::size_t known = 0;
  for (std::uint32_t id = 0; id < 43; ++id) known += ggml_type_size(id) != nullptr;
  REQUIRE(known == 35);
}

TEST_CASE("the GGUF writer refuses what it cannot write, and leaves nothing behind") {
  const TemporaryFolder folder;
  const std::string four = "four";
  const auto data = as_bytes(four);
  const auto write = [&](std::vector<GgufEntry> entries) { write_gguf(folder / "x", {}, entries); };
  REQUIRE_THROWS_AS(write({{"t", {2}, 0, data}}), ArgumentError);
  REQUIRE_THROWS_WITH(write({{"t", {2}, 0, data}}), Contains("\"t\": expected 8 bytes, got 4"));
  REQUIRE_THROWS_WITH(write({{"t", {1}, 5, data}}), Contains("tensor type of ggml"));
  REQUIRE_THROWS_WITH(write({{"t", {33}, 2, data}}), Contains("multiple of 32 as Q4_0"));
  REQUIRE_THROWS_WITH(write({{"t", {}, 2, data}}), Contains("multiple of 32 as Q4_0"));
  REQUIRE_THROWS_WITH(write({{"t", {-32}, 2, data}}), Contains("dims"));
  REQUIRE_THROWS_WITH(write({{"t", {1, 1, 1, 1, 1}, 0, data}}), Contains("at most 4 dims"));
  REQUIRE_THROWS_WITH(write({{"t", {1}, 0, data}, {"t", {1}, 0, data}}), Contains("twice"));
  REQUIRE_THROWS_WITH(write({{"", {1}, 0, data}}), Contains("1 to 63 bytes"));
  REQUIRE_THROWS_WITH(write({{std::string(64, 'n'), {1}, 0, data}}), Contains("1 to 63 bytes"));
  GgufMetadata alignment;
  alignment.set("general.alignment", std::uint32_t{24});
  REQUIRE_THROWS_WITH(write_gguf(folder / "x", alignment, {}), Contains("power of two"));
  alignment.set("general.alignment", std::int32_t{32});
  REQUIRE_THROWS_WITH(write_gguf(folder / "x", alignment, {}), Contains("power of two, got i32"));
  REQUIRE(folder.entries() == 0);
}
