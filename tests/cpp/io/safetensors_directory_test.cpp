#include "catch.hpp"
#include "io/files.hpp"
#include "qat/core/error.hpp"
#include "qat/io/safetensors.hpp"

using Catch::Contains;
using qat::FileError;
using namespace qat::io;
using namespace qat::test;

namespace {

constexpr const char* kIndex = "model.safetensors.index.json";

/// One U8 tensor per name; its single byte is the name's first letter.
void write_shard(const std::filesystem::path& path, const std::vector<std::string>& names) {
  std::vector<SafetensorsEntry> entries;
  for (const std::string& name : names) entries.push_back({name, Dtype::kU8, {1}, as_bytes(name).first(1)});
  write_safetensors(path, entries);
}

void write_index(const TemporaryFolder& folder, const std::string& weight_map) {
  put_file(folder / kIndex, R"({"metadata":{"total_size":3},"weight_map":)" + weight_map + "}");
}

}  // namespace

TEST_CASE("a folder with one file, and that file by itself, are the same model") {
  const TemporaryFolder folder;
  write_shard(folder / "model.safetensors", {"b", "a"});
  put_file(folder / kIndex, "not read when the whole model is there");
  for (const auto& path : {folder.path(), folder / "model.safetensors"}) {
    const SafetensorsDirectory model(path);
    REQUIRE(model.names() == std::vector<std::string>{"a", "b"});
    REQUIRE(as_text(model.at("b").data) == "b");
    REQUIRE(model.files().size() == 1);
  }
}

TEST_CASE("shards are read through the index") {
  const TemporaryFolder folder;
  write_shard(folder / "m-1.safetensors", {"c", "a"});
  write_shard(folder / "m-2.safetensors", {"b", "not listed"});
  write_index(folder, R"({"a":"m-1.safetensors","b":"m-2.safetensors","c":"m-1.safetensors"})");
  SafetensorsDirectory model(folder.path());
  const SafetensorsDirectory moved(std::move(model));
  REQUIRE(moved.names() == std::vector<std::string>{"a", "b", "c"});
  for (const char* name : {"a", "b", "c"}) REQUIRE(as_text(moved.at(name).data) == name);
  REQUIRE(moved.find("not listed") == nullptr);
  REQUIRE_THROWS_WITH(moved.at("d"), Contains(folder.path().string()) && Contains("\"d\""));
}

TEST_CASE("a tensor in two shards is refused, listed in one or not") {
  const TemporaryFolder folder;
  write_shard(folder / "m-1.safetensors", {"a", "b"});
  write_shard(folder / "m-2.safetensors", {"b", "c"});
  write_index(folder, R"({"a":"m-1.safetensors","b":"m-1.safetensors","c":"m-2.safetensors"})");
  REQUIRE_THROWS_AS(SafetensorsDirectory(folder.path()), FileError);
  REQUIRE_THROWS_WITH(
      SafetensorsDirectory(folder.path()),
      Contains("expected \"b\" in one shard, got it in \"m-1.safetensors\" and \"m-2.safetensors\""));
}

TEST_CASE("shards are filled in order up to the limit, and read again") {
  const TemporaryFolder folder;
  const std::string bytes(10, 'x');
  const auto entry = [&](const std::string& name, std::int64_t size) {
    return SafetensorsEntry{name, Dtype::kU8, {size}, as_bytes(bytes).first(static_cast<std::size_t>(size))};
  };
  const std::vector<SafetensorsEntry> entries{entry("d", 2), entry("a", 3), entry("c", 9), entry("b", 1),
                                              entry("e", 4)};
  const SafetensorsMetadata metadata{{"format", "pt"}};
  const auto names = write_safetensors_directory(folder.path(), entries, 5, metadata);
  REQUIRE(names == std::vector<std::string>{"model-00001-of-00003.safetensors",
                                            "model-00002-of-00003.safetensors",
                                            "model-00003-of-00003.safetensors", kIndex});
  const SafetensorsDirectory model(folder.path());
  REQUIRE(model.names() == std::vector<std::string>{"a", "b", "c", "d", "e"});
  REQUIRE(model.files()[0].find("d") != nullptr);
  REQUIRE(model.files()[0].find("a") != nullptr);
  REQUIRE(model.files()[1].tensors().size() == 1);
  REQUIRE(model.files()[2].tensors().size() == 2);
  for (const auto& file : model.files()) REQUIRE(file.metadata() == metadata);

  const TemporaryFolder whole;
  REQUIRE(write_safetensors_directory(whole.path(), entries, 19) ==
          std::vector<std::string>{"model.safetensors"});
  REQUIRE(SafetensorsDirectory(whole.path()).names().size() == 5);
}

TEST_CASE("shards that cannot be are refused before anything is written") {
  const TemporaryFolder folder;
  const std::string byte = "x";
  const SafetensorsEntry entry{"a", Dtype::kU8, {1}, as_bytes(byte)};
  REQUIRE_THROWS_AS(write_safetensors_directory(folder.path(), {entry}, 0), qat::ArgumentError);
  REQUIRE_THROWS_WITH(write_safetensors_directory(folder.path(), {entry, entry}, 1),
                      Contains("this one twice"));
  REQUIRE(std::filesystem::is_empty(folder.path()));
}

TEST_CASE("a broken index is refused with its path") {
  const TemporaryFolder folder;
  REQUIRE_THROWS_WITH(SafetensorsDirectory(folder.path()), Contains("got neither"));
  REQUIRE_THROWS_AS(SafetensorsDirectory(folder / "none"), FileError);
  write_shard(folder / "m.safetensors", {"a"});
  const std::vector<std::pair<std::string, std::string>> cases{
      {"[]", "weight_map"},
      {"{}", "weight_map"},
      {R"({"a":1})", "\"a\": expected the name of a file"},
      {R"({"a":"../m.safetensors"})", "../m.safetensors"},
      {R"({"a":"/etc/passwd"})", "beside the index"},
      {R"({"a":".."})", "beside the index"},
      {R"({"a":""})", "beside the index"},
      {R"({"a":"m.safetensors","a":"m.safetensors"})", "twice"},
      {R"({"a":"absent.safetensors"})", "absent.safetensors"},
      {R"({"a":"m.safetensors","b":"m.safetensors"})", "expected a tensor \"b\""},
  };
  for (const auto& [weight_map, message] : cases) {
    INFO(weight_map);
    write_index(folder, weight_map);
    REQUIRE_THROWS_AS(SafetensorsDirectory(folder.path()), FileError);
    REQUIRE_THROWS_WITH(SafetensorsDirectory(folder.path()), Contains(message));
  }
  for (const char* text : {"", "[1]", "null", "{\"weight_map\":"}) {
    put_file(folder / kIndex, text);
    REQUIRE_THROWS_AS(SafetensorsDirectory(folder.path()), FileError);
  }
}
