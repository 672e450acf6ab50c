#pragma once

// What the gradients of the scale rules share: which weights of a block determine its scales.

#include "qat/grid/device.hpp"

namespace qat::grid {

/// -1, 0 or 1.
QAT_HD float sign_of(float value) {
  return value > 0.0F ? 1.0F : value < 0.0F ? -1.0F : 0.0F;
}

/// Index of the first of the weights with the largest magnitude.
QAT_HD int64_t place_of_largest(const float* w, int64_t n) {
  int64_t found = 0;
  for (int64_t i = 1; i < n; ++i) found = magnitude(w[i]) > magnitude(w[found]) ? i : found;
  return found;
}

/// s = max|w| / divisor: grad_w[i] += grad_s * ds/dw[i].
QAT_HD void add_largest_gradient(const float* w, int64_t n, float divisor, float grad_s, float* grad_w) {
  const int64_t largest = place_of_largest(w, n);
  grad_w[largest] += grad_s * sign_of(w[largest]) / divisor;
}

/// Indices of the first least and of the first greatest weight.
struct EndPlaces {
  int64_t least;
  int64_t greatest;
};

/// Of n weights, at least one.
QAT_HD EndPlaces places_of_ends(const float* w, int64_t n) {
  EndPlaces ends{0, 0};
  for (int64_t i = 1; i < n; ++i) {
    ends.least = w[i] < w[ends.least] ? i : ends.least;
    ends.greatest = w[i] > w[ends.greatest] ? i : ends.greatest;
  }
  return ends;
}

}  // namespace qat::grid
