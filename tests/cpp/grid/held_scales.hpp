#pragma once

// Scales that a training step may produce, for tests of held and learned scales.

#include <array>
#include <limits>
#include <random>
#include <vector>

#include "qat/core/scheme.hpp"
#include "rows.hpp"

namespace qat::test {

inline constexpr std::array kKinds{EstimatorKind::kSte, EstimatorKind::kClippedSte, EstimatorKind::kTrustMask,
                                   EstimatorKind::kStableQat};

/// Two blocks, or rows of whole vectors with and without a tail.
inline std::vector<int64_t> few_lengths(const grid::Grid& g) {
  if (g.info().block > 0) return {2 * g.info().block};
  return {1, 7, 64, 577};
}

/// The rule's own scales for w, times one, times a factor of either sign that is different for each; zeros;
/// a few extreme values among them.
inline std::vector<Row> held_scales(std::mt19937& generator, const grid::Grid& g, const Row& w) {
  const auto n = static_cast<int64_t>(w.size());
  Row chosen(static_cast<size_t>(g.blocks(n) * g.params()));
  static_cast<void>(g.choose(w.data(), n, chosen.data()));
  std::uniform_real_distribution<float> factor(-1.5F, 1.5F);
  std::vector<Row> all{chosen, Row(chosen.size(), 0.0F)};
  for (const float extreme : {0.0F, kTiny, -0x1p-130F, 0x1p-126F, -3e-8F, 65519.0F, -1e9F, kHuge}) {
    Row s = chosen;
    for (float& value : s) value *= factor(generator);
    all.push_back(s);
    s[generator() % s.size()] = extreme;
    all.push_back(s);
    Row one(chosen.size(), extreme);
    all.push_back(one);
  }
  Row positive = chosen;
  for (float& value : positive) value *= std::abs(factor(generator));
  all.push_back(positive);
  return all;
}

}  // namespace qat::test
