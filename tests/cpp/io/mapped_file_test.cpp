#include "qat/io/mapped_file.hpp"

#include <sys/stat.h>

#include <cerrno>
#include <utility>

#include "catch.hpp"
#include "io/files.hpp"
#include "qat/core/error.hpp"

using Catch::Contains;
using qat::FileError;
using qat::io::MappedFile;
using qat::test::as_text;
using qat::test::put_file;
using qat::test::TemporaryFolder;

TEST_CASE("a mapped file is its bytes, across moves and the file's replacement") {
  const TemporaryFolder folder;
  put_file(folder / "a", std::string_view("one\0two", 7));
  put_file(folder / "b", "other");
  MappedFile first(folder / "a");
  const auto bytes = first.bytes();
  MappedFile second(std::move(first));
  REQUIRE(second.bytes().data() == bytes.data());
  REQUIRE(second.size() == 7);
  REQUIRE(second.path() == folder / "a");
  std::filesystem::rename(folder / "b", folder / "a");
  REQUIRE(as_text(bytes) == std::string_view("one\0two", 7));
  second = MappedFile(folder / "a");
  REQUIRE(as_text(second.bytes()) == "other");
}

TEST_CASE("an empty file is an empty span") {
  const TemporaryFolder folder;
  put_file(folder / "empty", "");
  REQUIRE(MappedFile(folder / "empty").bytes().empty());
}

TEST_CASE("what cannot be mapped is named with the system's message") {
  const TemporaryFolder folder;
  REQUIRE_THROWS_AS(MappedFile(folder / "none"), FileError);
  REQUIRE_THROWS_WITH(MappedFile(folder / "none"),
                      Contains((folder / "none").string()) && Contains(std::strerror(ENOENT)));
  REQUIRE_THROWS_WITH(MappedFile(folder.path()), Contains("a directory"));
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  REQUIRE_THROWS_WITH(MappedFile(folder / "pipe"), Contains("not a regular file"));
}
