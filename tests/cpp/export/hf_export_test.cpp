#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include "qat/core/error.hpp"
#include "qat/export/export.hpp"
#include "qat/export/requantization.hpp"
#include "qat/io/safetensors.hpp"
#include "tiny_checkpoint.hpp"

#include "catch.hpp"

namespace {

using Catch::Contains;

constexpr const char* kUp = "model.layers.0.mlp.up_proj.weight";

void export_hf(const qat::QuantizedCheckpoint& checkpoint, const std::string& path,
               const std::string& dtype = "") {
  qat::ExportOptions options;
  options.dtype = dtype;
  qat::export_checkpoint(checkpoint, path, "hf", options);
}

std::string dtype_of(const std::string& folder, const std::string& tensor) {
  return std::string(qat::io::to_string(qat::io::SafetensorsDirectory(folder).at(tensor).dtype));
}

}  // namespace

TEST_CASE("a folder holds the decoded weights, without the tied head") {
  const tiny::Folder folder("hf_plain");
  const auto checkpoint = tiny::checkpoint();
  export_hf(checkpoint, folder.file("out"));
  const qat::io::SafetensorsDirectory weights(folder.file("out"));
  REQUIRE(weights.names().size() == checkpoint.quantized.size() + checkpoint.floats.size());
  REQUIRE(weights.find("lm_head.weight") == nullptr);
  // Codes of 4 bits times powers of two are exact in every type: the narrowest is taken.
  REQUIRE(dtype_of(folder.file("out"), kUp) == "BF16");
  REQUIRE(qat::verify(folder.file("out"), checkpoint).empty());
  REQUIRE(folder.entries() == 1);
}

TEST_CASE("the embedding keeps its name when the head holds the tied tensor") {
  const tiny::Folder folder("hf_tied");
  auto checkpoint = tiny::checkpoint();
  checkpoint.quantized["lm_head.weight"] = checkpoint.quantized["model.embed_tokens.weight"];
  checkpoint.quantized.erase("model.embed_tokens.weight");
  checkpoint.aliases = {{"model.embed_tokens.weight", "lm_head.weight"}};
  export_hf(checkpoint, folder.file("out"));
  const qat::io::SafetensorsDirectory weights(folder.file("out"));
  REQUIRE(weights.find("lm_head.weight") == nullptr);
  REQUIRE(weights.find("model.embed_tokens.weight") != nullptr);
  REQUIRE(qat::verify(folder.file("out"), checkpoint).empty());
}

TEST_CASE("a tie that the configuration does not speak of is written twice") {
  const tiny::Folder folder("hf_untold");
  auto checkpoint = tiny::checkpoint();
  const std::string tie = R"("tie_word_embeddings": true)";
  checkpoint.config.replace(checkpoint.config.find(tie), tie.size(), R"("tie_word_embeddings": false)");
  export_hf(checkpoint, folder.file("out"));
  REQUIRE(qat::io::SafetensorsDirectory(folder.file("out")).find("lm_head.weight") != nullptr);
  REQUIRE(qat::verify(folder.file("out"), checkpoint).empty());
}

TEST_CASE("integers keep their type, half floats widen without loss") {
  const tiny::Folder folder("hf_types");
  auto checkpoint = tiny::checkpoint();
  checkpoint.floats["model.position_ids"] = at::full({1, 5}, 3, at::kLong);
  checkpoint.floats["model.norm.weight"] =
      at::full({64}, 1.0009765625, at::kHalf);  // 1 + 2^-10: not in bfloat16
  checkpoint.floats["model.empty"] = at::zeros({0, 3}, at::kFloat);
  export_hf(checkpoint, folder.file("out"));
  REQUIRE(dtype_of(folder.file("out"), "model.position_ids") == "I64");
  REQUIRE(dtype_of(folder.file("out"), "model.norm.weight") == "F16");
  REQUIRE(qat::verify(folder.file("out"), checkpoint).empty());
  export_hf(checkpoint, folder.file("rounded"), "bfloat16");
  const auto differences = qat::verify(folder.file("rounded"), checkpoint);
  REQUIRE(differences.size() == 1);
  REQUIRE(differences[0].tensor == "model.norm.weight");
  REQUIRE(differences[0].what == "rounded");
  REQUIRE(differences[0].count == 64);
  REQUIRE_THAT(tiny::read(folder.file("rounded") + "/libqat.json"),
               Contains("\"rounded_floats\": [\n    \"model.norm.weight\""));
}

TEST_CASE("blocks without their extreme code come out differently, and only those") {
  auto checkpoint = tiny::checkpoint();
  const auto changed = [&](const std::string& dtype) {
    int64_t sum = 0;
    for (const qat::Requantization& row : qat::requantization_report(checkpoint, dtype)) {
      if (row.tensor == kUp) sum = row.changed_blocks;
    }
    return sum;
  };
  // The codes of `tiny` step through all 16 within a block, and its scales are powers of two.
  for (const char* dtype : {"float32", "float16", "bfloat16"}) REQUIRE(changed(dtype) == 0);
  auto* codes = checkpoint.quantized[kUp].codes.data_ptr<int8_t>();
  for (int i = 0; i < 32; ++i) codes[5 * 64 + 32 + i] = std::max<int8_t>(codes[5 * 64 + 32 + i], -7);
  REQUIRE(changed("float32") == 1);
  // A scale with 11 significant bits: 8 times it needs them all.
  auto* scales = checkpoint.quantized[kUp].scales.data_ptr<float>();
  scales[0] = 0.25F + 0.25F / 1024;
  REQUIRE(changed("float32") == 1);
  REQUIRE(changed("float16") == 1);
  REQUIRE(changed("bfloat16") == 2);
}

TEST_CASE("the report does not depend on the number of threads") {
  const auto checkpoint = tiny::checkpoint(3);
  const int threads = at::get_num_threads();
  std::vector<std::vector<int64_t>> counts;
  for (const int count : {1, 4}) {
    at::set_num_threads(count);
    counts.emplace_back();
    for (const auto& row : qat::requantization_report(checkpoint))
      counts.back().push_back(row.changed_blocks);
  }
  at::set_num_threads(threads);
  REQUIRE(counts[0] == counts[1]);
}

TEST_CASE("a GGUF's tokenizer is left to the languages that can convert it") {
  const tiny::Folder folder("hf_gguf");
  auto checkpoint = tiny::checkpoint();
  qat::export_checkpoint(checkpoint, folder.file("a.gguf"));
  checkpoint.tokenizer = folder.file("a.gguf");
  REQUIRE_THROWS_AS(export_hf(checkpoint, folder.file("out")), qat::UnsupportedError);
  REQUIRE_THROWS_WITH(export_hf(checkpoint, folder.file("out")),
                      Contains("a.gguf") && Contains("got a GGUF"));
  REQUIRE(folder.entries() == 1);
}
