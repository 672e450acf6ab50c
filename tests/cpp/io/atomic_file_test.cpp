#include "qat/io/atomic_file.hpp"

#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <cerrno>

#include "catch.hpp"
#include "io/files.hpp"
#include "qat/core/error.hpp"

using Catch::Contains;
using qat::FileError;
using qat::io::AtomicFile;
using qat::test::get_file;
using qat::test::put_file;
using qat::test::TemporaryFolder;

namespace {

/// A full disk, as far as this process can see: no file may grow beyond `bytes`.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    ::signal(SIGXFSZ, handler_);
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;

 private:
  sighandler_t handler_;
  rlimit before_{};
};

}  // namespace

TEST_CASE("a committed file holds everything that was written, and nothing else is left") {
  const TemporaryFolder folder;
  const std::string large(3 << 20, 'x');  // beyond the buffer
  AtomicFile file(folder / "out");
  file.write("head");
  file.write(large);
  file.write_zeros(5000);
  file.write("tail");
  REQUIRE(file.size() == 4 + large.size() + 5000 + 4);
  REQUIRE_FALSE(std::filesystem::exists(folder / "out"));
  file.commit();
  REQUIRE(get_file(folder / "out") == "head" + large + std::string(5000, '\0') + "tail");
  REQUIRE(folder.entries() == 1);
  REQUIRE_THROWS_AS(file.write("more"), FileError);
  REQUIRE_THROWS_AS(file.commit(), FileError);
}

TEST_CASE("without a commit the earlier file stays and the temporary one goes") {
  const TemporaryFolder folder;
  put_file(folder / "out", "earlier");
  {
    AtomicFile file(folder / "out");
    file.write(std::string(2 << 20, 'x'));
    REQUIRE(folder.entries() == 2);
  }
  REQUIRE(get_file(folder / "out") == "earlier");
  REQUIRE(folder.entries() == 1);
}

TEST_CASE("the file's mode follows the umask") {
  const TemporaryFolder folder;
  const mode_t before = ::umask(027);
  qat::io::write_file_atomically(folder / "out", std::string_view("text"));
  ::umask(before);
  struct stat status{};
  REQUIRE(::stat((folder / "out").c_str(), &status) == 0);
  REQUIRE((status.st_mode & 0777) == 0640);
}

TEST_CASE("a full disk is an error that names the file, and leaves the earlier output intact") {
  const TemporaryFolder folder;
  put_file(folder / "out", "earlier");
  std::string message;
  {
    const FileSizeLimit limit(64 << 10);
    try {
      // Just above the limit, and a hundred times above it: at the last flush, and in the midst of writing.
      const auto bytes = GENERATE(std::size_t{70} << 10, std::size_t{6} << 20);
      AtomicFile file(folder / "out");
      file.write(std::string(bytes, 'x'));
      file.commit();
    } catch (const FileError& error) {
      message = error.what();
    }
  }
  REQUIRE_THAT(message, Contains((folder / "out").string()) && Contains(std::strerror(EFBIG)));
  REQUIRE(get_file(folder / "out") == "earlier");
  REQUIRE(folder.entries() == 1);
}

TEST_CASE("a place where no file can be written is an error before anything is written") {
  const TemporaryFolder folder;
  REQUIRE_THROWS_WITH(AtomicFile(folder / "none" / "out"),
                      Contains((folder / "none" / "out").string()) && Contains(std::strerror(ENOENT)));
  REQUIRE_THROWS_WITH(AtomicFile(folder.path()), Contains("got a directory"));
  // A rename would replace the device itself.
  REQUIRE_THROWS_WITH(AtomicFile("/dev/null"), Contains("/dev/null") && Contains("device"));
  REQUIRE(folder.entries() == 0);
}
