// What is recommended for a policy's grids.

#include "qat/policy/recipe.hpp"

#include <string>

#include "catch.hpp"

namespace {

using qat::Estimator;
using qat::EstimatorKind;
using qat::Policy;
using qat::Recipe;
using qat::ScaleRule;

Policy on(const std::string& grid, const std::string& estimator = "") {
  const std::string rules = R"({"rules": [{"match": ".*proj", "weight": ")" + grid + "\"}]";
  return Policy::from_json(rules + (estimator.empty() ? "" : R"(, "estimator": )" + estimator) + "}");
}

TEST_CASE("Where nothing is said, scales are learned from a PTQ solution on") {
  for (const char* grid : {"q4_0", "q2_0", "mlx3_g64", "int8_channel", "q4_k"}) {
    const Recipe recipe = qat::recommended(on(grid));
    REQUIRE(recipe.start == "guided");
    REQUIRE(recipe.policy.estimator() == Estimator{EstimatorKind::kSte, ScaleRule::kLearned});
    REQUIRE(recipe.scale_learning_rate > 0);
  }
}

TEST_CASE("A preset's estimator is for rounding without training") {
  const Recipe recipe = qat::recommended(Policy::preset("gguf-q2_0-mixed"));
  REQUIRE(Policy::preset("gguf-q2_0-mixed").estimator().scale == ScaleRule::kSearch);
  REQUIRE(recipe.policy.estimator().scale == ScaleRule::kLearned);
  REQUIRE(recipe.start == "guided");
}

TEST_CASE("An estimator of the user's own stays") {
  const Recipe searched = qat::recommended(on("q4_0", R"({"kind": "ste", "scale": "search"})"));
  REQUIRE(searched.start == "none");
  REQUIRE(searched.policy.estimator().scale == ScaleRule::kSearch);
  const Recipe learned = qat::recommended(on("q4_0", R"({"kind": "lsq"})"));
  REQUIRE(learned.start == "guided");
  REQUIRE(learned.policy.estimator().kind == EstimatorKind::kClippedSte);
  const Policy ruled = Policy::from_json(
      R"({"rules": [{"match": ".*", "weight": "q4_0", "estimator": {"kind": "clipped_ste"}}]})");
  REQUIRE(qat::recommended(ruled).start == "none");
  REQUIRE(qat::recommended(ruled).policy.to_json() == ruled.to_json());
}

TEST_CASE("Coarse grids take larger steps, and float policies start nowhere else") {
  REQUIRE(qat::recommended(on("q2_0")).learning_rate > qat::recommended(on("q4_0")).learning_rate);
  const Recipe control = qat::recommended(Policy::from_json(R"({"rules": []})"));
  REQUIRE(control.start == "none");
  REQUIRE(control.learning_rate == 1e-4);
  REQUIRE(control.policy.to_json() == Policy::from_json(R"({"rules": []})").to_json());
}

}  // namespace
