#pragma once

// The rows that the decoder families have in common; a family's file adds what it has besides.

#include <string_view>
#include <vector>

#include "qat/arch/family.hpp"

namespace qat::arch {

/// How the rows of q and k lie in GGUF, weights and biases alike.
struct AttentionRows {
  RowOrder query = RowOrder::kSame;
  RowOrder key = RowOrder::kSame;
};

/// Embedding, pre-norm attention and gated feed-forward layers, final norm, optional head; then `more`.
std::vector<TensorRule> decoder_tensors(AttentionRows rows, const std::vector<TensorRule>& more);

/// The keys of `architecture` for such a model; `head_dim`: when the size of a head is written; then `more`.
std::vector<ConfigKey> decoder_config(std::string_view architecture, Condition head_dim,
                                      const std::vector<ConfigKey>& more);

}  // namespace qat::arch
