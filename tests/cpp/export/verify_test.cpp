#include <ATen/ops/zeros.h>

#include <functional>
#include <iomanip>
#include <sstream>

#include "qat/core/error.hpp"
#include "qat/export/export.hpp"
#include "tiny_checkpoint.hpp"

#include "catch.hpp"

namespace {

using Catch::Contains;
using qat::QuantizedCheckpoint;

constexpr const char* kKey = "model.layers.0.self_attn.k_proj.weight";

/// What verify says of the file of `checkpoint` when it should be the changed one.
std::vector<qat::Difference> after(const std::function<void(QuantizedCheckpoint&)>& change, bool gguf) {
  const tiny::Folder folder("verify");
  QuantizedCheckpoint checkpoint = tiny::checkpoint(2);
  const std::string path = folder.file("a.qat.safetensors");
  if (gguf) {
    qat::export_checkpoint(checkpoint, path);  // the name does not decide what the file is
  } else {
    qat::save(checkpoint, path);
  }
  REQUIRE(qat::verify(path, checkpoint).empty());
  for (auto* tensor : {&checkpoint.quantized[kKey]}) {
    tensor->codes = tensor->codes.clone();
    tensor->scales = tensor->scales.clone();
  }
  change(checkpoint);
  return qat::verify(path, checkpoint);
}

void require_one(const std::vector<qat::Difference>& differences, const std::string& tensor,
                 const std::string& what) {
  REQUIRE(differences.size() == 1);
  REQUIRE(differences[0].tensor == tensor);
  REQUIRE(differences[0].what == what);
}

}  // namespace

TEST_CASE("differing codes, scales and values are counted, and the first is told") {
  const bool gguf = GENERATE(true, false);
  const auto codes = after(
      [](QuantizedCheckpoint& checkpoint) {
        int8_t* data = checkpoint.quantized[kKey].codes.data_ptr<int8_t>();
        for (const int64_t place : {17 * 64 + 5, 17 * 64 + 6, 20 * 64}) {
          data[place] = static_cast<int8_t>(data[place] == 7 ? 6 : data[place] + 1);
        }
      },
      gguf);
  REQUIRE(codes.size() == 2);
  REQUIRE(codes[0].what == "codes");
  REQUIRE(codes[0].count == 3);
  const int is = tiny::code(17, 5), wanted = is == 7 ? 6 : is + 1;
  REQUIRE(codes[0].first ==
          "row 17, position 5: expected " + std::to_string(wanted) + ", got " + std::to_string(is));
  REQUIRE(codes[1].what == "values");
  REQUIRE(codes[1].count == 3);

  float scale = 0.0F;
  const auto scales = after(
      [&scale](QuantizedCheckpoint& checkpoint) {
        float* place = checkpoint.quantized[kKey].scales.data_ptr<float>() + 3 * 2 + 1;
        scale = *place;
        *place *= 2;
      },
      gguf);
  REQUIRE(scales.size() == 2);
  REQUIRE(scales[0].what == "scales");
  REQUIRE(scales[0].count == 1);
  std::ostringstream digits;
  digits << std::setprecision(9) << "row 3, position 1: expected " << 2 * scale << ", got " << scale;
  REQUIRE(scales[0].first == digits.str());
  REQUIRE(scales[1].what == "values");
  REQUIRE(scales[1].count == 30);  // the block's two codes of 0 decode to 0 with any scale
}

TEST_CASE("another code that decodes to the same number is still a difference") {
  const tiny::Folder folder("zero");
  QuantizedCheckpoint checkpoint = tiny::checkpoint();
  auto& tensor = checkpoint.quantized[kKey];
  tensor.scales.data_ptr<float>()[0] = 0.0F;
  tensor.codes.data_ptr<int8_t>()[0] = 3;
  qat::export_checkpoint(checkpoint, folder.file("a"));
  tensor.codes.data_ptr<int8_t>()[0] = 4;
  require_one(qat::verify(folder.file("a"), checkpoint), kKey, "codes");
}

TEST_CASE("tensors of another kind, shape or presence are named") {
  const bool gguf = GENERATE(true, false);
  require_one(after([](QuantizedCheckpoint& c) { c.quantized[kKey].scheme.weight = "q8_0"; }, gguf), kKey,
              "type");
  require_one(
      after([](QuantizedCheckpoint& c) { c.floats["model.norm.weight"] = at::zeros({32}, at::kFloat); },
            gguf),
      "model.norm.weight", "shape");
  const auto values = after(
      [](QuantizedCheckpoint& c) { c.floats["model.norm.weight"] = at::zeros({64}, at::kFloat); }, gguf);
  require_one(values, "model.norm.weight", "values");
  REQUIRE(values[0].count == 64);
  REQUIRE_THAT(values[0].first, Contains("expected bits 0x00000000, got bits 0x3f800000"));
  require_one(
      after([](QuantizedCheckpoint& c) { c.floats["model.layers.0.mlp.up_proj.bias"] = at::zeros({32}); },
            gguf),
      "model.layers.0.mlp.up_proj.bias", "missing");
}

TEST_CASE("surplus tensors and another configuration are named") {
  const tiny::Folder folder("surplus");
  QuantizedCheckpoint checkpoint = tiny::checkpoint();
  checkpoint.floats["model.layers.0.mlp.up_proj.bias"] = at::zeros({32}, at::kFloat);
  qat::export_checkpoint(checkpoint, folder.file("a"));
  require_one(qat::verify(folder.file("a"), tiny::checkpoint()), "blk.0.ffn_up.bias", "extra");

  checkpoint.config.replace(checkpoint.config.find("500000"), 6, "400000");
  const auto differences = qat::verify(folder.file("a"), checkpoint);
  require_one(differences, "llama.rope.freq_base", "metadata");
  REQUIRE(differences[0].first == "expected 400000.000000, got 500000.000000");
}

TEST_CASE("a checkpoint file with another alias or configuration differs") {
  const auto alias = after(
      [](QuantizedCheckpoint& c) {
        c.aliases["lm_head.weight"] = kKey;
        c.config = "{}";
      },
      false);
  REQUIRE(alias.size() == 2);
  REQUIRE(alias[0].what == "alias");
  REQUIRE(alias[1].what == "metadata");
}

TEST_CASE("a malformed file is an error, not a difference") {
  const tiny::Folder folder("malformed");
  qat::export_checkpoint(tiny::checkpoint(), folder.file("a"));
  const std::string whole = tiny::read(folder.file("a"));
  for (const std::size_t size : {std::size_t{4}, std::size_t{100}, whole.size() / 2, whole.size() - 32}) {
    tiny::write(folder.file("b"), whole.substr(0, size));
    REQUIRE_THROWS_AS(qat::verify(folder.file("b"), tiny::checkpoint()), qat::FileError);
  }
  REQUIRE_THROWS_AS(qat::verify(folder.file("absent"), tiny::checkpoint()), qat::FileError);
}
