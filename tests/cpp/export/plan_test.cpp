#include "qat/export/plan.hpp"

#include "catch.hpp"
#include "qat/checkpoint/outline.hpp"
#include "qat/core/error.hpp"
#include "tiny_checkpoint.hpp"

namespace {

/// The checkpoint with shapes only.
qat::QuantizedCheckpoint emptied(qat::QuantizedCheckpoint checkpoint) {
  for (auto& [key, tensor] : checkpoint.quantized) {
    tensor = qat::outline_tensor(key, tensor.shape, tensor.scheme);
  }
  for (auto& [key, tensor] : checkpoint.floats) tensor = tensor.to(at::kMeta);
  return checkpoint;
}

int64_t bytes_of(const qat::ExportPlan& plan, const std::string& name) {
  for (const qat::FileTensor& tensor : plan.tensors) {
    if (tensor.name == name) return tensor.bytes;
  }
  return -1;
}

}  // namespace

TEST_CASE("a plan says what the writers write, with numbers or without") {
  const qat::QuantizedCheckpoint checkpoint = tiny::checkpoint();
  for (const std::string_view target : qat::export_targets()) {
    const qat::ExportPlan with = qat::plan_export(checkpoint, target);
    const qat::ExportPlan without = qat::plan_export(emptied(checkpoint), target);
    INFO(target);
    REQUIRE(!without.tensors.empty());
    if (target != "gguf" && target != "hf") continue;  // the others need numbers to take q4_0 over
    REQUIRE(with.tensors.size() == without.tensors.size());
    for (size_t i = 0; i < with.tensors.size(); ++i) {
      REQUIRE(with.tensors[i].name == without.tensors[i].name);
      REQUIRE(with.tensors[i].type == without.tensors[i].type);
      REQUIRE(with.tensors[i].bytes == without.tensors[i].bytes);
    }
  }
}

TEST_CASE("bytes of a GGUF: 18 for 32 weights of q4_0, 4 for each of a norm") {
  const qat::ExportPlan plan = qat::plan_export(emptied(tiny::checkpoint()), "gguf");
  REQUIRE(plan.obstacles.empty());
  REQUIRE(bytes_of(plan, "blk.0.ffn_up.weight") == tiny::kFeedForward * tiny::kHidden / 32 * 18);
  REQUIRE(bytes_of(plan, "blk.0.attn_norm.weight") == 4 * tiny::kHidden);
  REQUIRE(bytes_of(plan, "output.weight") == -1);  // tied
}

TEST_CASE("a stack of experts has the rows of its matrices") {
  const qat::QuantizedTensor stack = qat::outline_tensor("experts", {4, 6, 64}, {"q4_0"});
  REQUIRE(stack.shape == std::vector<int64_t>{4, 6, 64});
  REQUIRE(stack.codes.sizes() == at::IntArrayRef({24, 64}));
  REQUIRE(stack.scales.sizes() == at::IntArrayRef({24, 2, 1}));
  REQUIRE(stack.codes.is_meta());
  REQUIRE_THROWS_AS(qat::outline_tensor("experts", {4, 6, 30}, {"q4_0"}), qat::ArgumentError);
  REQUIRE_THROWS_AS(qat::outline_tensor("vector", {64}, {"q4_0"}), qat::ArgumentError);
  REQUIRE_THROWS_AS(qat::outline_tensor("nothing", {}, {"q4_0"}), qat::ArgumentError);
  REQUIRE_THROWS_AS(qat::outline_tensor("float", {4, 32}, {"bf16"}), qat::ArgumentError);
}

TEST_CASE("an unknown target is refused with the known ones") {
  REQUIRE_THROWS_WITH(qat::plan_export(tiny::checkpoint(), "onnx"),
                      Catch::StartsWith("plan_export: target: expected one of gguf, "));
  REQUIRE_THROWS_AS(qat::plan_export(tiny::checkpoint(), "hf", "int8"), qat::ArgumentError);
}
