#pragma once

// What the inputs of a layer look like, summed over a calibration text.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>

namespace qat::ptq {

/// How much each token of the calibration windows counts, for each weight: name -> float32[n, T], not
/// negative, of mean 1; see token_sensitivity. Weights without an entry count all tokens alike.
using TokenWeights = std::map<std::string, at::Tensor>;

/// How the error of a looked-up row counts beside that of the products of a table that is also a head: name
/// -> float64[N, N], added to E[s x x^T] of the head's inputs; see sensitivity. Tables without an entry count
/// as heads alone.
using LookupCurvatures = std::map<std::string, at::Tensor>;

/// How errors of a layer's outputs count together: name -> float32[K, S, S], E[g g^T] of the loss's gradients
/// g at the outputs k S .. k S + S - 1, see RefineOptions::outputs and sensitivity. Weights without an entry
/// count all outputs alike and apart.
using OutputCurvatures = std::map<std::string, at::Tensor>;

/// Moments of one layer's inputs. Memory: N^2 float64 and as many float32.
class InputMoments {
 public:
  /// width: N, the layer's in_features.
  explicit InputMoments(int64_t width);

  /// input: [..., N] of any float type; each of its vectors x counts once, or weights[...] times where there
  /// are any: E[weight x x^T]. Products are summed in float32 over some 16,384 vectors (or those of a call,
  /// if they are more), and in float64 beyond. ArgumentError for another width.
  void add(const at::Tensor& input, const at::Tensor& weights = {});

  /// Vectors added so far.
  int64_t count() const noexcept { return count_; }
  /// E[x x^T], float64[N, N]; zeros before the first `add`.
  at::Tensor second() const;
  /// E[|x|], float64[N].
  at::Tensor magnitude() const;

 private:
  int64_t count_ = 0, recent_count_ = 0;
  at::Tensor recent_;     ///< float32[N, N]: sums that second_ lacks
  at::Tensor second_;     ///< float64[N, N]: sums; only panels on and right of the diagonal
  at::Tensor magnitude_;  ///< float64[N]: sums
};

}  // namespace qat::ptq
