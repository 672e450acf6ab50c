// The file: what is written is read back bit for bit, and nothing else is accepted.

#include <ATen/Context.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>

#include "qat/checkpoint/checkpoint.hpp"
#include "qat/core/error.hpp"
#include "qat/io/safetensors.hpp"

// Catch comes last.
#include "catch.hpp"

namespace {

using qat::ArgumentError;
using qat::FileError;
using qat::QuantizedCheckpoint;
using qat::io::Dtype;

/// A folder that disappears with the test.
struct TemporaryFolder {
  TemporaryFolder() {
    path = std::filesystem::temp_directory_path() / ("qat_checkpoint_" + std::to_string(::getpid()));
    std::filesystem::create_directories(path);
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path); }
  std::string file(const std::string& name) const { return (path / name).string(); }
  std::filesystem::path path;
};

std::string bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

at::Tensor random(at::IntArrayRef shape, uint64_t seed = 0) {
  at::manual_seed(seed);
  return at::randn(shape);
}

/// Every kind of content: each integer grid, odd widths, an alias, floats of several types, a scalar,
/// nothing.
QuantizedCheckpoint sample() {
  return qat::freeze_tensors({{"a", random({3, 64}, 1), {"q4_0"}},
                              {"b", random({3, 64}, 2), {"q4_1"}},
                              {"c", random({3, 64}, 3), {"q8_0"}},
                              {"d", random({5, 3, 3, 3}, 4), {"int2_channel"}},
                              {"e", random({5, 7}, 5), {"int4_channel"}},
                              {"f", random({1, 1}, 6), {"int8_channel"}},
                              {"g", random({5, 7}, 10), {"int3_channel"}},
                              {"h", random({3, 64}, 11), {"int2_g32"}},
                              {"zeros", at::zeros({2, 32}), {"q4_0"}},
                              {"norm", random({64}, 7), {}},
                              {"brain", random({4, 4}, 8), {"bf16"}},
                              {"half", random({4, 4}, 9), {"f16"}},
                              {"steps", at::full({}, -3, at::kLong), {}},
                              {"empty", at::zeros({0, 4}), {}}},
                             {{"tied", "a"}, {"tied_norm", "norm"}}, R"({"model_type": "llama"})",
                             "dir/tokenizer.json", R"({"rules":[]})");
}

bool same(const QuantizedCheckpoint& x, const QuantizedCheckpoint& y) {
  bool equal = x.aliases == y.aliases && x.config == y.config && x.tokenizer == y.tokenizer &&
               x.policy == y.policy && x.quantized.size() == y.quantized.size() &&
               x.floats.size() == y.floats.size();
  for (const auto& [key, tensor] : x.quantized) {
    const qat::QuantizedTensor& other = y.quantized.at(key);
    equal = equal && tensor.scheme == other.scheme && tensor.shape == other.shape &&
            at::equal(tensor.codes, other.codes) && at::equal(tensor.scales, other.scales);
  }
  for (const auto& [key, tensor] : x.floats) {
    const at::Tensor& other = y.floats.at(key);
    equal = equal && tensor.scalar_type() == other.scalar_type() && at::equal(tensor, other);
  }
  return equal;
}

using Entries = std::vector<qat::io::SafetensorsEntry>;
using Metadata = qat::io::SafetensorsMetadata;

/// Writes a small good checkpoint ("w": q4_0 [2, 32], "n": f32 [3]) after `change` has spoiled it.
std::string spoiled(const TemporaryFolder& folder, const std::function<void(Entries&, Metadata&)>& change) {
  const std::string good = folder.file("good.qat.safetensors");
  qat::save(qat::freeze_tensors({{"w", random({2, 32}), {"q4_0"}}, {"n", random({3}), {}}}, {{"t", "w"}}),
            good);
  const qat::io::SafetensorsFile file(good);
  Entries entries;
  for (const auto& tensor : file.tensors()) {
    entries.push_back({tensor.name, tensor.dtype, tensor.shape, tensor.data});
  }
  Metadata metadata = file.metadata();
  change(entries, metadata);
  const std::string bad = folder.file("bad.qat.safetensors");
  qat::io::write_safetensors(bad, entries, metadata);
  return bad;
}

qat::io::SafetensorsEntry& entry(Entries& entries, const std::string& name) {
  for (auto& candidate : entries) {
    if (candidate.name == name) return candidate;
  }
  throw std::runtime_error(name);
}

/// The message of the FileError with which the spoiled file is refused, without the file's name.
std::string refusal(const std::function<void(Entries&, Metadata&)>& change) {
  const TemporaryFolder folder;
  const std::string path = spoiled(folder, change);
  const std::string start = "load: " + path + ": ";
  try {
    qat::load(path);
  } catch (const FileError& error) {
    const std::string message = error.what();
    REQUIRE_THAT(message, Catch::StartsWith(start));
    return message.substr(start.size());
  }
  FAIL("accepted");
  return "";
}

}  // namespace

TEST_CASE("what is saved is loaded, bit for bit") {
  const TemporaryFolder folder;
  const std::string path = folder.file("x.qat.safetensors");
  const QuantizedCheckpoint checkpoint = sample();
  qat::save(checkpoint, path);
  const QuantizedCheckpoint loaded = qat::load(path);
  REQUIRE(same(checkpoint, loaded));
  const auto before = qat::dequantize(checkpoint);
  const auto after = qat::dequantize(loaded);
  REQUIRE(before.size() == after.size());
  for (size_t i = 0; i < before.size(); ++i) REQUIRE(at::equal(before[i].value, after[i].value));
}

TEST_CASE("the same checkpoint gives the same bytes, whatever its path") {
  const TemporaryFolder folder;
  std::filesystem::create_directories(folder.path / "deeper");
  qat::save(sample(), folder.file("one.qat.safetensors"));
  qat::save(qat::load(folder.file("one.qat.safetensors")), folder.file("deeper/two.qat.safetensors"));
  REQUIRE(bytes_of(folder.file("one.qat.safetensors")) ==
          bytes_of(folder.file("deeper/two.qat.safetensors")));
}

TEST_CASE("the file holds what its header promises") {
  const TemporaryFolder folder;
  const std::string path = folder.file("x.qat.safetensors");
  qat::save(sample(), path);
  const qat::io::SafetensorsFile file(path);
  REQUIRE(file.metadata().at("libqat.format") == "1");
  REQUIRE(file.metadata().at("libqat.aliases") == R"({"tied":"a","tied_norm":"norm"})");
  REQUIRE_THAT(file.metadata().at("libqat.tensors"),
               Catch::StartsWith(R"({"a":{"shape":[3,64],"weight":"q4_0"},"b":)"));
  const auto expect = [&](const char* name, Dtype dtype, const std::vector<int64_t>& shape) {
    REQUIRE(file.at(name).dtype == dtype);
    REQUIRE(file.at(name).shape == shape);
  };
  expect("a.codes", Dtype::kU8, {3, 32});
  expect("a.scales", Dtype::kF16, {3, 2});
  expect("b.mins", Dtype::kF16, {3, 2});
  expect("c.codes", Dtype::kU8, {3, 64});
  expect("d.codes", Dtype::kU8, {5, 7});  // 27 codes of 2 bits
  expect("d.scales", Dtype::kF32, {5, 1});
  expect("e.codes", Dtype::kU8, {5, 4});  // 7 codes of 4 bits
  expect("steps", Dtype::kI64, {});
  REQUIRE(file.find("tied") == nullptr);
}

TEST_CASE("a checkpoint on strided tensors is written like one on contiguous ones") {
  const TemporaryFolder folder;
  QuantizedCheckpoint checkpoint =
      qat::freeze_tensors({{"w", random({4, 32}), {"q8_0"}}, {"n", random({4, 6}), {}}});
  qat::save(checkpoint, folder.file("a"));
  qat::QuantizedTensor& tensor = checkpoint.quantized.at("w");
  tensor.codes = tensor.codes.t().contiguous().t();
  checkpoint.floats.at("n") = checkpoint.floats.at("n").t().contiguous().t();
  qat::save(checkpoint, folder.file("b"));
  REQUIRE(bytes_of(folder.file("a")) == bytes_of(folder.file("b")));
}

TEST_CASE("saving refuses what loading would, and leaves an earlier file alone") {
  const TemporaryFolder folder;
  const std::string path = folder.file("x.qat.safetensors");
  qat::save(sample(), path);
  const std::string before = bytes_of(path);
  const auto refused = [&](const std::function<void(QuantizedCheckpoint&)>& change) {
    QuantizedCheckpoint checkpoint = sample();
    change(checkpoint);
    std::string message;
    try {
      qat::save(checkpoint, path);
    } catch (const ArgumentError& error) {
      message = error.what();
    }
    REQUIRE(bytes_of(path) == before);
    return message;
  };
  REQUIRE(refused([](auto& c) { c.quantized["e"].codes[0][0] = 8; }) ==
          "save: e: expected codes from -8 to 7 (int4_channel), got 8");
  REQUIRE(refused([](auto& c) { c.quantized["d"].codes[0][0] = -3; }) ==
          "save: d: expected codes from -2 to 1 (int2_channel), got -3");
  REQUIRE(refused([](auto& c) { c.quantized["a"].scales[1][0][0] = 0.1F; }) ==
          "save: a: expected finite scales that their stored type (F16) holds, got 0.100000 in row 1");
  REQUIRE_THAT(
      refused([](auto& c) { c.quantized["e"].scales[0][0][0] = std::numeric_limits<float>::infinity(); }),
      Catch::Contains("save: e: expected finite scales"));
  REQUIRE(refused([](auto& c) { c.quantized["e"].codes = at::Tensor(); }) ==
          "save: e: expected codes Char[5, 7], got none");
  REQUIRE(refused([](auto& c) { c.quantized["e"].scales = c.quantized["e"].scales.squeeze(); }) ==
          "save: e: expected scales Float[5, 1, 1], got Float[5]");
  REQUIRE(refused([](auto& c) { c.quantized["e"].shape = {5, 8}; }) ==
          "save: e: expected codes Char[5, 8], got Char[5, 7]");
  REQUIRE_THAT(refused([](auto& c) { c.floats["e"] = at::zeros({1}); }), Catch::Contains("save: e: "));
  REQUIRE_THAT(refused([](auto& c) { c.floats["a.codes"] = at::zeros({1}); }), Catch::Contains("a.codes"));
  REQUIRE_THAT(refused([](auto& c) { c.aliases["x"] = "y"; }), Catch::Contains("save: x: "));
  REQUIRE_THAT(refused([](auto& c) { c.config = "\xff"; }), Catch::Contains("UTF-8"));
  REQUIRE_THAT(refused([](auto& c) { c.aliases["\xff"] = "a"; }), Catch::Contains("UTF-8"));
}

TEST_CASE("a file that cannot be written is a FileError, one that is missing too") {
  REQUIRE_THROWS_AS(qat::save(sample(), "/nonexistent/folder/x"), FileError);
  REQUIRE_THROWS_AS(qat::load("/nonexistent/x.qat.safetensors"), FileError);
  REQUIRE_THROWS_WITH(qat::load("/nonexistent/x.qat.safetensors"),
                      Catch::Contains("/nonexistent/x.qat.safetensors"));
}

TEST_CASE("a file cut anywhere is refused") {
  const TemporaryFolder folder;
  const std::string path = folder.file("x.qat.safetensors");
  qat::save(sample(), path);
  const std::string whole = bytes_of(path);
  for (size_t length = 0; length < whole.size(); length += 37) {
    std::ofstream(path, std::ios::binary) << whole.substr(0, length);
    REQUIRE_THROWS_AS(qat::load(path), FileError);
  }
}

TEST_CASE("a flipped byte is refused, or read and written back as it is") {
  const TemporaryFolder folder;
  const std::string path = folder.file("x.qat.safetensors");
  qat::save(sample(), path);
  const std::string whole = bytes_of(path);
  uint64_t header = 0;
  std::memcpy(&header, whole.data(), sizeof header);
  size_t accepted = 0;
  for (size_t at = 0; at < whole.size(); at += 23) {
    std::string changed = whole;
    changed[at] = static_cast<char>(changed[at] ^ 0x55);
    std::ofstream(path, std::ios::binary) << changed;
    try {
      qat::save(qat::load(path), folder.file("again"));
    } catch (const FileError&) {
      continue;
    }
    // Another name in the header may sort elsewhere; of the data every bit must have been read.
    if (at < 8 + header) continue;
    REQUIRE(bytes_of(folder.file("again")) == changed);
    ++accepted;
  }
  REQUIRE(accepted > 10);  // most bytes are codes, and every pattern of 4 bits is a code
}

TEST_CASE("an ordinary safetensors file is not a checkpoint") {
  REQUIRE(refusal([](Entries&, Metadata& metadata) { metadata.clear(); }) ==
          "expected a libqat checkpoint (metadata libqat.format), got none");
  REQUIRE(refusal([](Entries&, Metadata& metadata) { metadata["libqat.format"] = "2"; }) ==
          "libqat.format: expected version 1, got \"2\"");
  REQUIRE(refusal([](Entries&, Metadata& metadata) { metadata.erase("libqat.config"); }) ==
          "expected a libqat checkpoint (metadata libqat.config), got none");
}

TEST_CASE("metadata that disagrees with the tensors is refused by name") {
  const auto tensors = [](const std::string& json) {
    return refusal([&](Entries&, Metadata& metadata) { metadata["libqat.tensors"] = json; });
  };
  REQUIRE(tensors("{") == "libqat.tensors: expected a JSON object, got malformed JSON");
  REQUIRE(tensors("[]") == "libqat.tensors: expected a JSON object, got array");
  REQUIRE(tensors(R"({"w": 1})") ==
          "w: expected the keys weight and shape in libqat.tensors, got something else");
  REQUIRE_THAT(tensors(R"({"w": {"weight": "q4_0", "shape": [2, 32], "bits": 4}})"),
               Catch::Contains("weight and shape"));
  REQUIRE(tensors(R"({"w": {"weight": 4, "shape": [2, 32]}})") ==
          "w: expected weight as a string, got number");
  REQUIRE(tensors(R"({"w": {"weight": "q4_0", "shape": "2x32"}})") ==
          "w: expected shape as an array, got string");
  REQUIRE(tensors(R"({"w": {"weight": "q4_0", "shape": [2, -32]}})") ==
          "w: expected a shape of whole numbers, got number");
  REQUIRE_THAT(tensors(R"({"w": {"weight": "q4_0", "shape": [2, 3.5]}})"), Catch::Contains("whole numbers"));
  REQUIRE_THAT(tensors(R"({"w": {"weight": "q4_0", "shape": [2, 18446744073709551615]}})"),
               Catch::Contains("whole numbers"));
  REQUIRE(tensors(R"({"w": {"weight": "q4_9", "shape": [2, 32]}})") ==
          "w: expected a grid of this version, got \"q4_9\"");
  REQUIRE(tensors(R"({"w": {"weight": "bf16", "shape": [2, 32]}})") ==
          "w: expected an integer grid, got \"bf16\"");
  for (const char* shape : {"[]", "[64]", "[2, 0]", "[0, 32]", "[2, 33]", "[9223372036854775807, 32]",
                            "[2, 9223372036854775807]", "[4294967296, 4294967296, 32]"}) {
    REQUIRE_THAT(tensors(R"({"w": {"weight": "q4_0", "shape": )" + std::string(shape) + "}}"),
                 Catch::StartsWith(
                     "w: expected a shape [R, ...] with rows of a multiple of 32 weights (q4_0), got ["));
  }
  REQUIRE(tensors(R"({"w": {"weight": "q4_0", "shape": [2, 64]}})") ==
          "w.codes: expected U8[2, 32], got U8[2, 16]");
  REQUIRE(tensors(R"({"w": {"weight": "q8_0", "shape": [2, 16]}})").find("w: ") == 0);
  REQUIRE(tensors(R"({"w": {"weight": "q4_1", "shape": [2, 32]}})") ==
          "w.mins: expected F16[2, 1], got none");
  REQUIRE(tensors(R"({"v": {"weight": "q4_0", "shape": [2, 32]}})") ==
          "v.codes: expected U8[2, 16], got none");
}

TEST_CASE("parts that are missing or of another type are refused by name") {
  REQUIRE(refusal([](Entries& entries, Metadata&) { entry(entries, "w.scales").name = "w.other"; }) ==
          "w.scales: expected F16[2, 1], got none");
  REQUIRE(refusal([](Entries& entries, Metadata&) { entry(entries, "w.codes").dtype = Dtype::kI8; }) ==
          "w.codes: expected U8[2, 16], got I8[2, 16]");
  REQUIRE(refusal([](Entries& entries, Metadata&) { entry(entries, "w.scales").dtype = Dtype::kBF16; }) ==
          "w.scales: expected F16[2, 1], got BF16[2, 1]");
  REQUIRE(refusal([](Entries& entries, Metadata&) { entry(entries, "n").dtype = Dtype::kU32; }) ==
          "n: expected a tensor of floats, integers or bools, got U32");
}

TEST_CASE("aliases that point nowhere are refused by name") {
  const auto aliases = [](const std::string& json) {
    return refusal([&](Entries&, Metadata& metadata) { metadata["libqat.aliases"] = json; });
  };
  REQUIRE(aliases(R"({"t": "v"})") == "t: expected an alias of a tensor, got \"v\", which is none");
  REQUIRE(aliases(R"({"t": "t"})") == "t: expected an alias of a tensor, got \"t\", which is none");
  REQUIRE(aliases(R"({"s": "t", "t": "w"})") == "s: expected an alias of a tensor, got \"t\", which is none");
  REQUIRE(aliases(R"({"n": "w"})") == "n: expected an alias or a tensor, got both");
  REQUIRE(aliases(R"({"t": 1})") == "t: expected an alias as a string, got number");
}

TEST_CASE("scales that are not finite are refused with their row") {
  static const std::vector<uint16_t> halves{0x3c00, 0x7e00};  // 1, NaN
  REQUIRE(refusal([](Entries& entries, Metadata&) {
            entry(entries, "w.scales").data = std::as_bytes(std::span(halves));
          }) == "w: expected finite scales that their stored type (F16) holds, got nan in row 1");
}

TEST_CASE("bits that no code uses must be 0") {
  const TemporaryFolder folder;
  const std::string path = folder.file("x.qat.safetensors");
  qat::save(qat::freeze_tensors({{"w", random({1, 3}), {"int2_channel"}}}), path);
  std::string bytes = bytes_of(path);
  bytes.back() = static_cast<char>(bytes.back() | 0x80);  // U8 data comes last: 3 codes of 2 bits in one byte
  std::ofstream(path, std::ios::binary) << bytes;
  REQUIRE_THROWS_WITH(qat::load(path),
                      "load: " + path + ": w.codes: expected unused bits of 0, got others in row 0");
}
