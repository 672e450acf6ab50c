#pragma once

#include <cstdint>
#include <random>
#include <vector>

/// Normal values from a seed.
inline std::vector<float> random_values(int64_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(generator);
  return values;
}
