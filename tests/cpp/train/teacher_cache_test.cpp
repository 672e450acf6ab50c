// Answers on disk: what they hold, how a build goes on, and what is refused.

#include "qat/train/teacher_cache.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/topk.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "train/scratch_folder.hpp"
#include "train/tiny_run.hpp"

namespace {

using qat::train::CacheKey;
using qat::train::CachePlan;
using qat::train::CacheProgress;
using qat::train::LanguageModel;
using qat::train::Options;
using qat::train::plan_teacher_cache;
using qat::train::TeacherCache;
using qat::train::TokenData;

constexpr const char* kFileVariable = "QAT_TEST_CACHE";
constexpr int64_t kLength = 8, kTop = 4, kText = 100;  // 12 windows
constexpr std::uint64_t kTeacher = 0xfedcba9876543210u;
constexpr std::size_t kHeader = 64;
/// window, 7 x 4 ids of 2 bytes, 7 x 4 halves, 7 floats, 4 bytes of filling, checksum
constexpr std::size_t kRecord = 8 + 56 + 56 + 28 + 4 + 8;

Options run_options() {
  Options options = tiny_options();
  options.steps = 100;  // more than the text has windows
  options.telemetry_every = 0;
  return options;
}

TokenData text() {
  return tiny_data(kText);
}

/// A tiny teacher in one piece or in halves, that counts the windows it is asked.
struct Teacher {
  TinySetup setup;
  int64_t asked = 0;

  LanguageModel whole() {
    return [this](const at::Tensor& tokens) {
      asked += tokens.size(0);
      return setup.teacher->forward(tokens);
    };
  }
  LanguageModel halves() {
    return {[this](const at::Tensor& tokens) { return setup.teacher->hidden(tokens); },
            [this] { return setup.teacher->output_head(); }};
  }
};

CachePlan full_plan() {
  return plan_teacher_cache(text(), run_options(), kTop, kTeacher);
}

/// Builds everything and returns how many windows the teacher was asked.
int64_t build(const std::string& path, const CachePlan& plan = full_plan(), int64_t stop_after = 1000) {
  Teacher teacher;
  TeacherCache::build(path, plan, teacher.whole(), text(), run_options(),
                      [&](const CacheProgress&) { return teacher.asked < stop_after; });
  return teacher.asked;
}

}  // namespace

TEST_CASE("a plan is the windows that a run reads") {
  REQUIRE(full_plan().windows == std::vector<int64_t>({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}));
  Options options = run_options();
  options.steps = 2;
  options.accumulate = 2;
  const auto windows = plan_teacher_cache(text(), options, kTop, kTeacher).windows;
  REQUIRE(windows.size() == 8);
  REQUIRE(std::is_sorted(windows.begin(), windows.end()));
  for (int64_t index = 0; index < 4; ++index) {
    for (const int64_t window : text().windows(index, 2, kLength, 0)) {
      REQUIRE(std::find(windows.begin(), windows.end(), window) != windows.end());
    }
  }
  const auto refused = [&](int64_t top_k) {
    return message<qat::ArgumentError>([&] { plan_teacher_cache(text(), run_options(), top_k, 0); });
  };
  REQUIRE_THAT(refused(0), Catch::Contains("top_k"));
  REQUIRE_THAT(refused(kTinyVocabulary), Catch::Contains("top_k: expected 1 to 16, got 17"));
  options.sequence_length = kText + 1;
  REQUIRE_THAT(message<qat::ArgumentError>([&] { plan_teacher_cache(text(), options, kTop, 0); }),
               Catch::Contains("one window of 101"));
}

TEST_CASE("windows of a batch are the batch") {
  const TokenData data = text();
  for (int64_t index = 0; index < 9; ++index) {
    const auto windows = data.windows(index, 4, kLength, 3);
    REQUIRE(data.read(windows, kLength).equal(data.batch(index, 4, kLength, 3)));
  }
  REQUIRE(data.read({11}, kLength)[0].equal(data.tokens().slice(0, 88, 96)));
  REQUIRE_THROWS_WITH(data.read({12}, kLength), Catch::Contains("window: expected 0 to 11, got 12"));
  REQUIRE_THROWS_AS(data.read({-1}, kLength), qat::ArgumentError);
}

TEST_CASE("a cache holds the teacher's top outcomes and the rest, in half precision") {
  const ScratchFolder folder;
  const std::string path = folder / "new/teacher.cache";
  Options options = run_options();
  options.objective.temperature = 2;
  const CachePlan plan = plan_teacher_cache(text(), options, kTop, kTeacher);
  Teacher teacher;
  const bool in_halves = GENERATE(false, true);
  REQUIRE(TeacherCache::build(path, plan, in_halves ? teacher.halves() : teacher.whole(), text(), options));
  const TeacherCache cache = TeacherCache::open(path, plan);
  const std::vector<int64_t> windows = {7, 0, 11};
  const qat::train::TeacherAnswer answer = cache.answer(windows);
  const at::Tensor logits = teacher.setup.teacher->forward(text().read(windows, kLength)).slice(1, 0, -1);
  const at::Tensor log_p = at::log_softmax(logits.to(at::kDouble) / 2, -1);
  const at::Tensor expected = std::get<0>(std::get<1>(at::topk(log_p, kTop)).sort(-1));
  REQUIRE(answer.ids.equal(expected));
  const at::Tensor rest = at::logsumexp(log_p.scatter(-1, expected, -INFINITY), -1);
  const at::Tensor top = log_p.gather(-1, expected);
  // Half precision keeps 11 bits, float32 of the model 2^-20 or so at these magnitudes.
  REQUIRE(((answer.log_p.slice(2, 0, kTop) - top).abs() <= top.abs() / 2048 + 1e-5).all().item<bool>());
  REQUIRE((answer.log_p.select(2, kTop) - rest).abs().max().item<double>() < 1e-4);
}

TEST_CASE("the file is laid out as its header says") {
  const ScratchFolder folder;
  const std::string path = folder / "teacher.cache";
  REQUIRE(build(path) == 12);
  const std::string bytes = read_file(path);
  REQUIRE(bytes.size() == kHeader + 12 * kRecord);
  REQUIRE(full_plan().bytes() == static_cast<int64_t>(bytes.size()));
  REQUIRE(bytes.substr(0, 8) == std::string("QATTCH1\0", 8));
  REQUIRE(bytes.substr(8, 8) == std::string("\x10\x32\x54\x76\x98\xba\xdc\xfe"));
  const auto word = [&](std::size_t at) { return static_cast<unsigned char>(bytes[at]); };
  REQUIRE(word(24) == kTinyVocabulary);
  REQUIRE(word(32) == kLength);
  REQUIRE(word(40) == kTop);
  REQUIRE(bytes.substr(48, 8) == std::string("\0\0\0\0\0\0\xf0\x3f", 8));  // 1.0
  for (std::size_t i = 0; i < 12; ++i) REQUIRE(word(kHeader + i * kRecord) == i);
  const auto answer = TeacherCache::open(path, full_plan()).answer({3});
  REQUIRE(word(kHeader + 3 * kRecord + 8) == answer.ids[0][0][0].item<int64_t>());
  std::filesystem::remove(path);
  build(path);
  REQUIRE(read_file(path) == bytes);  // deterministic
}

TEST_CASE("a vocabulary beyond 65536 has ids of four bytes") {
  const ScratchFolder folder;
  const std::string path = folder / "wide.cache";
  constexpr int64_t kWide = 70001;
  const TokenData data = TokenData::from_tensor(at::arange(16) + 69000, kWide);
  const CachePlan plan = plan_teacher_cache(data, run_options(), 3, 1);
  const LanguageModel teacher = [](const at::Tensor& tokens) {
    at::Tensor logits = at::zeros({tokens.size(0), tokens.size(1), kWide});
    for (const int64_t id : {70000, 5, 65536}) logits.select(2, id).fill_(30);
    return logits;
  };
  REQUIRE(TeacherCache::build(path, plan, teacher, data, run_options()));
  const auto answer = TeacherCache::open(path, plan).answer({1});
  REQUIRE(answer.ids[0][6].equal(at::tensor({5, 65536, 70000}, at::kLong)));
  REQUIRE(std::filesystem::file_size(path) == kHeader + 2 * (8 + 84 + 42 + 28 + 6 + 8));
}

TEST_CASE("a build computes what is missing and nothing else") {
  const ScratchFolder folder;
  const std::string path = folder / "teacher.cache", whole = folder / "whole.cache";
  build(whole);
  REQUIRE(TeacherCache::missing(path, full_plan()) == 12);
  CachePlan some = full_plan();
  some.windows = {2, 9};
  REQUIRE(build(path, some) == 2);
  REQUIRE(TeacherCache::missing(path, full_plan()) == 10);
  REQUIRE_THAT(message([&] { TeacherCache::open(path, full_plan()); }),
               Catch::Contains("12 windows, got all but 10"));
  REQUIRE(build(path, full_plan(), 4) == 4);  // stopped by progress
  REQUIRE(TeacherCache::missing(path, full_plan()) == 6);
  REQUIRE(build(path) == 6);
  REQUIRE(build(path) == 0);
  const auto ours = TeacherCache::open(path, full_plan()), theirs = TeacherCache::open(whole, full_plan());
  for (int64_t window = 0; window < 12; ++window) {
    REQUIRE(ours.answer({window}).ids.equal(theirs.answer({window}).ids));
    REQUIRE(ours.answer({window}).log_p.equal(theirs.answer({window}).log_p));
  }
}

TEST_CASE("progress counts windows, those that were there included") {
  const ScratchFolder folder;
  const std::string path = folder / "teacher.cache";
  build(path, full_plan(), 6);
  Teacher teacher;
  std::vector<int64_t> done;
  TeacherCache::build(path, full_plan(), teacher.whole(), text(), run_options(),
                      [&](const CacheProgress& now) {
                        done.push_back(now.done);
                        REQUIRE(now.total == 12);
                        REQUIRE(now.tokens_per_second > 0);
                        REQUIRE(now.seconds_left >= 0);
                        return true;
                      });
  REQUIRE(done == std::vector<int64_t>({8, 10, 12}));
}

TEST_CASE("the life of a killed build", "[.killed-build]") {
  Teacher teacher;
  TeacherCache::build(std::getenv(kFileVariable), full_plan(), teacher.whole(), text(), run_options(),
                      [&](const CacheProgress& now) {
                        if (now.done == 6) std::raise(SIGKILL);
                        return true;
                      });
}

TEST_CASE("killed, a build goes on where it was, even in the middle of a record") {
  const ScratchFolder folder;
  const std::string path = folder / "teacher.cache", whole = folder / "whole.cache";
  build(whole);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    setenv(kFileVariable, path.c_str(), 1);
    execl("/proc/self/exe", "test_train", "[.killed-build]", nullptr);
    _exit(1);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFSIGNALED(status));
  REQUIRE(read_file(path).size() == kHeader + 6 * kRecord);
  const bool torn = GENERATE(false, true);
  if (torn) std::filesystem::resize_file(path, kHeader + 6 * kRecord - 10);
  if (torn)
    REQUIRE_THAT(message([&] { TeacherCache::open(path, full_plan()); }), Catch::Contains("whole records"));
  REQUIRE(build(path) == (torn ? 7 : 6));
  REQUIRE(read_file(path) == read_file(whole));
}

TEST_CASE("a damaged record is refused when it is read, and made again by a build") {
  const ScratchFolder folder;
  const std::string path = folder / "teacher.cache";
  build(path);
  const std::string good = read_file(path);
  for (const std::size_t at : {8u, 40u, 70u, 130u, 159u}) {  // ids, ids, log_p, rest, checksum of window 5
    std::string bytes = good;
    bytes[kHeader + 5 * kRecord + at] ^= 0x10;
    write_file(path, bytes);
    const TeacherCache cache = TeacherCache::open(path, full_plan());
    REQUIRE(cache.answer({4}).ids.defined());
    REQUIRE_THAT(message([&] { cache.answer({4, 5}); }),
                 Catch::Contains(path) && Catch::Contains("window 5") && Catch::Contains("damaged"));
    REQUIRE(TeacherCache::missing(path, full_plan()) == 1);
    REQUIRE(build(path) == 1);
    REQUIRE(read_file(path) == good);
  }
}

TEST_CASE("records that lie about their window are found") {
  const ScratchFolder folder;
  const std::string path = folder / "teacher.cache";
  build(path);
  const std::string good = read_file(path);
  for (const char window : {'\x03', '\x7f'}) {  // one that is there, one that the text does not have
    std::string bytes = good;
    bytes[kHeader + 5 * kRecord] = window;
    write_file(path, bytes);
    REQUIRE_THAT(message([&] { TeacherCache::open(path, full_plan()); }), Catch::Contains("all but 1"));
    REQUIRE(build(path) == 1);
    REQUIRE(read_file(path) == good);
  }
  std::string bytes = good;
  bytes[kHeader + 5 * kRecord + 7] = '\xff';  // beyond 2^63
  write_file(path, bytes);
  REQUIRE(build(path) == 1);
  REQUIRE(read_file(path) == good);
}

TEST_CASE("numbers that no build writes are refused although their checksum holds") {
  // The record of window 0 with its ids out of order: its checksum is that of another file's honest record.
  const ScratchFolder folder;
  const std::string path = folder / "teacher.cache";
  const TokenData data = TokenData::from_tensor(at::zeros({2}, at::kLong), 5);
  Options options = run_options();
  options.sequence_length = 2;
  const LanguageModel teacher = [](const at::Tensor& tokens) {
    return at::zeros({tokens.size(0), 2, 5}) + at::tensor({0., 3., 0., 3., 0.}).to(at::kFloat);
  };
  const CachePlan five = plan_teacher_cache(data, options, 2, 1);
  REQUIRE(TeacherCache::build(path, five, teacher, data, options));
  // The same records under the header of a vocabulary of 3, which token 3 leaves.
  const TokenData narrow = TokenData::from_tensor(at::zeros({2}, at::kLong), 3);
  const CachePlan three = plan_teacher_cache(narrow, options, 2, 1);
  const std::string other = folder / "narrow.cache";
  const LanguageModel any = [](const at::Tensor& tokens) { return at::zeros({tokens.size(0), 2, 3}); };
  REQUIRE(TeacherCache::build(other, three, any, narrow, options));
  write_file(other, read_file(other).substr(0, kHeader) + read_file(path).substr(kHeader));
  const TeacherCache cache = TeacherCache::open(other, three);
  REQUIRE_THAT(message([&] { cache.answer({0}); }), Catch::Contains("no answer"));
}

TEST_CASE("every flipped byte of a header is refused, and the file left alone") {
  const ScratchFolder folder;
  const std::string path = folder / "teacher.cache";
  build(path);
  const std::string good = read_file(path);
  for (std::size_t at = 0; at < kHeader; ++at) {
    std::string bytes = good;
    bytes[at] ^= 1;
    write_file(path, bytes);
    REQUIRE_THAT(message([&] { TeacherCache::open(path, full_plan()); }), Catch::Contains("header"));
    REQUIRE_THAT(message([&] { build(path); }), Catch::Contains("header"));
    REQUIRE(read_file(path) == bytes);
  }
  for (const std::size_t size : {std::size_t{0}, std::size_t{7}, kHeader - 1}) {
    write_file(path, good.substr(0, size));
    REQUIRE_THAT(message([&] { TeacherCache::open(path, full_plan()); }), Catch::Contains("header"));
    REQUIRE_THAT(message([&] { build(path); }), Catch::Contains("header"));
  }
  REQUIRE_THAT(message([&] { TeacherCache::open(folder / "nothing", full_plan()); }),
               Catch::Contains("nothing"));
  REQUIRE_THAT(message([&] { build(folder / "."); }), Catch::Contains("directory"));
}

TEST_CASE("another model's, text's or setting's cache is refused by name") {
  const ScratchFolder folder;
  const std::string path = folder / "teacher.cache";
  build(path);
  const std::string good = read_file(path);
  const auto refusal = [&](const std::function<void(CacheKey&)>& change) {
    CachePlan plan = full_plan();
    change(plan.key);
    const std::string text = message([&] { TeacherCache::open(path, plan); });
    REQUIRE(message([&] { TeacherCache::missing(path, plan); }) == text);
    REQUIRE(message([&] { build(path, plan); }) == text);
    REQUIRE(read_file(path) == good);
    return text;
  };
  REQUIRE(refusal([](CacheKey&) {}) == "accepted");
  REQUIRE_THAT(refusal([](CacheKey& k) { k.teacher ^= 1; }), Catch::Contains("another teacher"));
  REQUIRE_THAT(refusal([](CacheKey& k) { k.text ^= 1; }), Catch::Contains("another text"));
  REQUIRE_THAT(refusal([](CacheKey& k) { k.vocabulary = 18; }), Catch::Contains("another vocabulary"));
  REQUIRE_THAT(refusal([](CacheKey& k) { k.length = 9; }),
               Catch::Contains("another length: expected 9, got 8"));
  REQUIRE_THAT(refusal([](CacheKey& k) { k.top_k = 5; }),
               Catch::Contains("another top_k: expected 5, got 4"));
  REQUIRE_THAT(refusal([](CacheKey& k) { k.temperature = 2; }),
               Catch::Contains("another temperature: expected 2.0") && Catch::Contains("remove the file"));
}

TEST_CASE("two builders do not share a file, and broken teachers leave no record") {
  const ScratchFolder folder;
  const std::string path = folder / "teacher.cache";
  build(path, full_plan(), 2);
  {
    Teacher teacher;
    TeacherCache::build(path, full_plan(), teacher.whole(), text(), run_options(), [&](const CacheProgress&) {
      REQUIRE_THAT(message([&] { build(path); }), Catch::Contains("only process"));
      return false;
    });
  }
  REQUIRE(TeacherCache::missing(path, full_plan()) == 8);
  const LanguageModel broken = [](const at::Tensor& tokens) {
    at::Tensor logits = at::zeros({tokens.size(0), tokens.size(1), kTinyVocabulary});
    logits[1][3].fill_(std::numeric_limits<double>::quiet_NaN());
    return logits;
  };
  const auto run = [&](const LanguageModel& teacher) {
    TeacherCache::build(path, full_plan(), teacher, text(), run_options());
  };
  REQUIRE_THAT(message<qat::NumericError>([&] { run(broken); }), Catch::Contains("window 5"));
  REQUIRE_THAT(message<qat::ArgumentError>([&] { run(nullptr); }), Catch::Contains("teacher"));
  const LanguageModel narrow = [](const at::Tensor& tokens) {
    return at::zeros({tokens.size(0), kLength, 16});
  };
  REQUIRE_THAT(message<qat::ArgumentError>([&] { run(narrow); }), Catch::Contains("vocabulary of 17"));
  REQUIRE(TeacherCache::missing(path, full_plan()) == 8);
}

TEST_CASE("a fingerprint sees every weight, name and note") {
  const TinySetup setup;
  const std::uint64_t before = qat::train::fingerprint(*setup.teacher, "bfloat16");
  REQUIRE(qat::train::fingerprint(*TinySetup().teacher, "bfloat16") == before);
  REQUIRE(qat::train::fingerprint(*setup.teacher, "float32") != before);
  const c10::NoGradGuard no_grad;
  setup.teacher->up->weight[31][31].add_(1e-6);
  REQUIRE(qat::train::fingerprint(*setup.teacher, "bfloat16") != before);
}
