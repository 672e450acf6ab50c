#pragma once

// A forward pass as plain data, cut in front of its linear layers, so that methods which look at a layer's
// inputs can round one layer after the other without knowing the model.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace qat {

/// One step of a forward pass, which ends where the input of some linear layers is ready.
struct Stage {
  /// What the step before left -> what this one leaves; the first step takes {tokens}. The last tensor is the
  /// input of `weights`, [..., I] in the compute dtype. Applies the weights of the steps before, as they are
  /// at the time of the call.
  std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)> run;
  /// Names of all weights that are multiplied with that input, [O, I]; nothing else reads it. Of a stage of
  /// experts, stacks [E, O, I].
  std::vector<std::string> weights;
  /// Names of parameters whose entry (or row) r scales the inputs i with producer_rows[i] == r, in proportion
  /// and nothing else: the gain of the norm, or weight and bias of the layer before. Empty when there are
  /// none.
  std::vector<std::string> producers;
  /// [I]; empty when producers is, and for r = i.
  std::vector<int64_t> producer_rows;
  /// The weights are also the table that the first step looks tokens up in: a head tied to the embedding.
  bool tied = false;
  /// E of a stage of experts, else 0. Its input is [n, I], sorted by expert, and the tensor before it,
  /// int64[E] on the CPU, counts the rows of each.
  int64_t experts = 0;
};

}  // namespace qat
