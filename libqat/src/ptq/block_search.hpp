#pragma once

// The search of `weighted_search` in one block of a grid, through nothing but the grid's own functions.

#include <cstdint>
#include <vector>

#include "qat/grid/grid.hpp"

namespace qat::ptq {

/// Holds buffers: one per thread.
class BlockSearch {
 public:
  /// n: weights in a block.
  BlockSearch(const grid::Grid& grid, int64_t n);

  /// w: float32[n], importance: float64[n] -> s: float32[P]. Where no candidate can be stored, s is the
  /// rule's.
  grid::Status operator()(const float* w, const double* importance, float* s);

 private:
  /// The weighted squared error under scales s, infinite where the file cannot hold them. Leaves codes_ and
  /// stored_.
  double error(const float* s);
  /// Takes s where its error is less.
  bool offer(const float* s);
  /// Offers the rule's scales for `factor` times the weights.
  void offer_rule(float factor);
  /// Fits the best scales to their codes, all at once and one by one, while that helps.
  void refit();
  /// Fills steps_ with the change of the decoded weights along each parameter.
  void linearise();
  /// Offers the best scales moved along parameters [first, last) to the least error of their codes.
  bool offer_fitted(int first, int last);

  const grid::Grid& grid_;
  int64_t n_;
  int params_;
  const float* w_ = nullptr;
  const double* importance_ = nullptr;
  double least_ = 0.0;
  std::vector<float> best_, candidate_, stored_, scaled_, decoded_, moved_;
  std::vector<float> lengths_;  ///< [P]: how far `linearise` moved each parameter
  std::vector<double> steps_;   ///< [P, n]
  std::vector<float> base_, base_stored_;
  std::vector<int8_t> codes_, base_codes_;
};

}  // namespace qat::ptq
