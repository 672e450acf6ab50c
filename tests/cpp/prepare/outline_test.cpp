#include "qat/prepare/outline.hpp"

#include "catch.hpp"
#include "qat/core/error.hpp"

using qat::Policy;
using qat::SlotKind;
using qat::Target;

namespace {

const Policy& policy() {
  static const Policy policy = Policy::from_json(R"({"rules": [
      {"match": "table", "weight": "q8_0"}, {"match": "half", "weight": "f16"}, {"match": "kept", "weight": "f32"},
      {"match": "experts", "weight": "int4_channel"}]})");
  return policy;
}

const std::vector<Target> kTensors{
    {"table.weight", SlotKind::kEmbedding, {10, 64}}, {"half.weight", SlotKind::kLinear, {3, 5}},
    {"kept.weight", SlotKind::kLinear, {3, 5}},       {"experts", SlotKind::kLinear, {2, 3, 8}},
    {"norm.weight", SlotKind::kOther, {5}},           {"open.weight", SlotKind::kLinear, {3, 5}}};

}  // namespace

TEST_CASE("an outline is the checkpoint of a model without numbers") {
  const qat::QuantizedCheckpoint outline = qat::outline(kTensors, policy(), at::kBFloat16, "{}");
  REQUIRE(outline.config == "{}");
  REQUIRE(outline.quantized.size() == 2);
  REQUIRE(outline.quantized.at("table.weight").scheme.weight == "q8_0");
  // A scale for each row of each expert.
  REQUIRE(outline.quantized.at("experts").scales.sizes() == at::IntArrayRef({6, 1, 1}));
  REQUIRE(outline.floats.size() == 4);
  REQUIRE(outline.floats.at("half.weight").scalar_type() == at::kHalf);
  for (const char* name : {"kept.weight", "norm.weight", "open.weight"}) {
    REQUIRE(outline.floats.at(name).scalar_type() == at::kBFloat16);
    REQUIRE(outline.floats.at(name).is_meta());
  }
}

TEST_CASE("an outline has the policy's errors") {
  std::vector<Target> twice = kTensors;
  twice.push_back(kTensors[1]);
  REQUIRE_THROWS_WITH(qat::outline(twice, policy()),
                      "outline: half.weight: expected each tensor once, got it twice");
  std::vector<Target> narrow = kTensors;
  narrow[0].shape = {10, 60};
  REQUIRE_THROWS_WITH(qat::outline(narrow, policy()), Catch::Contains("a multiple of 32"));
  REQUIRE_THROWS_WITH(qat::outline({kTensors[1]}, policy()), Catch::Contains("rules[0].match"));
}
