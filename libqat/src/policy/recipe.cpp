#include "qat/policy/recipe.hpp"

#include <algorithm>
#include <limits>
#include <string_view>
#include <vector>

#include "qat/grid/grid.hpp"

namespace qat {
namespace {

constexpr int kFloat = std::numeric_limits<int>::max();

/// The fewest bits of a code among the rules' integer grids.
int fewest_bits(const Policy& policy) {
  int bits = kFloat;
  for (const Rule& rule : policy.rules()) {
    const grid::Info& info = grid::find(rule.scheme.weight).info();
    if (!info.is_float) bits = std::min(bits, info.bits);
  }
  return bits;
}

/// A preset's estimator is for those who round without training.
bool names_an_estimator(const Policy& policy) {
  const std::vector<std::string_view> presets = Policy::presets();
  if (std::find(presets.begin(), presets.end(), policy.name()) != presets.end()) return false;
  return policy.estimator() != Estimator{} ||
         std::any_of(policy.rules().begin(), policy.rules().end(),
                     [](const Rule& rule) { return rule.estimator.has_value(); });
}

bool learns_scales(const Policy& policy) {
  return std::all_of(policy.rules().begin(), policy.rules().end(), [&](const Rule& rule) {
    return grid::find(rule.scheme.weight).info().is_float ||
           is_learned(rule.estimator.value_or(policy.estimator()).scale);
  });
}

}  // namespace

Recipe recommended(const Policy& policy) {
  const int bits = fewest_bits(policy);
  Recipe recipe{.policy = policy};
  if (bits != kFloat && !names_an_estimator(policy)) {
    recipe.policy = policy.with_estimator({EstimatorKind::kSte, ScaleRule::kLearned, ScaleGradient::kLsq});
  }
  if (bits != kFloat && learns_scales(recipe.policy)) {
    recipe.start = "guided";
    // At 3 bits faster training leaves the start's solution for a worse one; 2 bits have more to move.
    recipe.learning_rate = bits <= 2 ? 4e-4 : bits == 3 ? 5e-5 : 2e-4;
    recipe.scale_learning_rate = bits <= 2 ? 3e-3 : bits == 3 ? 3e-4 : 1e-3;
    recipe.final_learning_rate = 0;
  }
  return recipe;
}

}  // namespace qat
