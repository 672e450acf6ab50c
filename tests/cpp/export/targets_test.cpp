#include "qat/export/export.hpp"

#include <ATen/TensorOperators.h>

#include "qat/core/error.hpp"
#include "tiny_checkpoint.hpp"

#include "catch.hpp"

namespace {

using Catch::Contains;

}  // namespace

TEST_CASE("can_export lists every tensor in the way, or none") {
  auto checkpoint = tiny::checkpoint();
  REQUIRE(qat::can_export(checkpoint, "gguf").empty());
  REQUIRE(qat::can_export(checkpoint, "hf").empty());
  for (const char* key : {"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"}) {
    checkpoint.quantized[key].scheme.weight = "int4_g32";
    checkpoint.quantized[key].scales = checkpoint.quantized[key].scales * 1.1F;
  }
  const auto obstacles = qat::can_export(checkpoint, "gguf");
  REQUIRE(obstacles.size() == 2);
  REQUIRE(obstacles[0].tensor == "model.layers.0.mlp.down_proj.weight");
  REQUIRE(obstacles[0].grid == "int4_g32");
  REQUIRE_THAT(obstacles[0].reason, Contains("scales of q4_0 cannot hold"));
  REQUIRE_THROWS_WITH(qat::can_export(checkpoint, "onnx"), Contains("can_export: target: expected one of"));
}

TEST_CASE("a model that a format cannot describe is an obstacle without a tensor") {
  auto checkpoint = tiny::checkpoint();
  checkpoint.config.replace(checkpoint.config.find("llama"), 5, "bert");
  const auto obstacles = qat::can_export(checkpoint, "gguf");
  REQUIRE(obstacles.size() == 1);
  REQUIRE(obstacles[0].tensor.empty());
  REQUIRE_THAT(obstacles[0].reason, Contains("bert"));
  REQUIRE(qat::can_export(checkpoint, "hf").empty());
}

TEST_CASE("import takes up a checkpoint file, and says what it cannot read") {
  const tiny::Folder folder("import");
  const auto checkpoint = tiny::checkpoint();
  qat::save(checkpoint, folder.file("a.qat.safetensors"));
  REQUIRE(
      qat::verify(folder.file("a.qat.safetensors"), qat::import_checkpoint(folder.file("a.qat.safetensors")))
          .empty());
  qat::export_checkpoint(checkpoint, folder.file("hf"), "hf");
  REQUIRE_THROWS_AS(qat::import_checkpoint(folder.file("hf")), qat::UnsupportedError);
  REQUIRE_THROWS_WITH(qat::import_checkpoint(folder.file("hf")), Contains("holds codes and scales"));
  REQUIRE_THROWS_AS(qat::import_checkpoint(folder.file("absent")), qat::FileError);
}

TEST_CASE("options that a target does not have are refused") {
  qat::ExportOptions options;
  options.overwrite = true;
  REQUIRE_THROWS_WITH(qat::can_export(tiny::checkpoint(), "gguf", options),
                      Contains("overwrite: expected it with the targets") && Contains("got \"gguf\""));
}
