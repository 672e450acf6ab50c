#pragma once

// What gradients say of one weight: which tokens count, how errors of its outputs count together, and, of a
// table that is also a head, how much the place counts where its rows are looked up. `sensitivity` collects
// them from a decoder's backward pass; whoever runs another model's has the same sums here.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace qat::ptq {

/// Sums over the calls of one layer. The formulas are those of `Sensitivity`.
class LayerSensitivity {
 public:
  /// tensor: the weight's name, for messages.
  explicit LayerSensitivity(std::string tensor);

  /// The place of a call with that many tokens, in the order of calls; they count for nothing until a
  /// gradient is added.
  int64_t expect(int64_t tokens);
  /// gradient: floats [..., O], dL/dy at the layer's outputs in the call at that place. ArgumentError for
  /// another count of tokens or outputs.
  void add(int64_t place, const at::Tensor& gradient);
  /// gradient: floats [..., N], dL/d(row) at the rows of the weight that a call looked up.
  void add_lookups(const at::Tensor& gradient);

  /// Whether the loss depends on the layer, so that there is something to say. NumericError for gradients
  /// that are not finite.
  bool counts() const;
  /// float32[tokens] of mean 1, call by call: the mean over outputs of their squared gradients, clipped at 8
  /// means. Only if it counts, as what follows.
  at::Tensor tokens() const;
  /// float32[K, S, S], E[g g^T] in groups of at most 1,024 neighbouring outputs, of tokens that are clipped
  /// at 8 means of those so far. Undefined where rows were looked up, whose errors do not count together, and
  /// above 32,768 outputs.
  at::Tensor outputs() const;
  /// float64[N, N], what the looked-up rows' place adds to E[s x x^T]; undefined where none were.
  at::Tensor lookups() const;

 private:
  void add_curvature(const at::Tensor& gradient, const at::Tensor& squares);
  double mean_square() const;

  std::string tensor_;
  int64_t width_ = 0;                          ///< O
  double sum_ = 0.0;                           ///< of the squares
  int64_t count_ = 0;                          ///< tokens in them
  std::vector<at::Tensor> squares_, lookups_;  ///< of each call, flat: float32[n]; float32[n, N]
  at::Tensor curvature_;                       ///< float32[K, S, S]: sums, half of each
};

}  // namespace qat::ptq
