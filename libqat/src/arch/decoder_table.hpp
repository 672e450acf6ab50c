#pragma once

// The rows that the decoder families have in common; a family's file adds what it has besides.

#include <string_view>
#include <utility>
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

/// The same with norms on queries and keys, and before and after both halves of a layer.
std::vector<TensorRule> sandwich_tensors(const std::vector<TensorRule>& more);

/// The keys of `architecture` for a model whose layers are all alike; `head_dim`: when the size of a head is
/// written; then `more`.
std::vector<ConfigKey> decoder_config(std::string_view architecture, Condition head_dim,
                                      const std::vector<ConfigKey>& more);

/// The keys of `architecture` for a model of layers with and without a sliding window, but for the sizes of
/// their heads; then `more`.
std::vector<ConfigKey> layered_config(std::string_view architecture, const std::vector<ConfigKey>& more);

/// `Family::hf_prefixes` of models that see and hear, as transformers 5 and as older ones name them.
std::vector<std::pair<std::string_view, std::string_view>> multimodal_prefixes();

}  // namespace qat::arch
