#include "qat/io/atomic_folder.hpp"
#include "catch.hpp"
#include "io/files.hpp"
#include "qat/core/error.hpp"
#include "qat/io/atomic_file.hpp"

using Catch::Contains;
using qat::FileError;
using namespace qat::io;
using namespace qat::test;

namespace {

std::size_t entries(const std::filesystem::path& folder) {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(folder), {}));
}

}  // namespace

TEST_CASE("a folder appears at the commit, whole") {
  const TemporaryFolder home;
  const auto target = home / "out";
  {
    AtomicFolder folder(target);
    write_file_atomically(folder.staging() / "a", "text");
    REQUIRE_FALSE(std::filesystem::exists(target));
    folder.commit();
    REQUIRE_THROWS_WITH(folder.commit(), Contains("got a second"));
  }
  REQUIRE(entries(target) == 1);
  REQUIRE(entries(home.path()) == 1);
}

TEST_CASE("without a commit nothing stays") {
  const TemporaryFolder home;
  {
    AtomicFolder folder(home / "out");
    std::filesystem::create_directory(folder.staging() / "sub");
    write_file_atomically(folder.staging() / "sub" / "a", "text");
  }
  REQUIRE(entries(home.path()) == 0);
}

TEST_CASE("an empty folder gives way, another one only to a replacement") {
  const TemporaryFolder home;
  const auto target = home / "out";
  std::filesystem::create_directory(target);
  {
    AtomicFolder folder(target.string() + "/");  // a slash at the end means the same
    write_file_atomically(folder.staging() / "a", "first");
    folder.commit();
  }
  {
    AtomicFolder folder(target);
    write_file_atomically(folder.staging() / "b", "second");
    REQUIRE_THROWS_AS(folder.commit(), FileError);
    REQUIRE(std::filesystem::exists(target / "a"));
    folder.replace();
  }
  REQUIRE_FALSE(std::filesystem::exists(target / "a"));
  REQUIRE(std::filesystem::exists(target / "b"));
  REQUIRE(entries(home.path()) == 1);
}

TEST_CASE("failures name the folder and leave what was there") {
  const TemporaryFolder home;
  REQUIRE_THROWS_AS(AtomicFolder(home / "absent" / "out"), FileError);
  REQUIRE_THROWS_WITH(AtomicFolder(home / "absent" / "out"), Contains((home / "absent" / "out").string()));
  write_file_atomically(home / "file", "text");
  AtomicFolder folder(home / "file");
  REQUIRE_THROWS_WITH(folder.replace(), Contains("expected to rename the folder"));
  REQUIRE(std::filesystem::is_regular_file(home / "file"));
}
