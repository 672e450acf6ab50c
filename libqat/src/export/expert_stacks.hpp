#pragma once

// Experts of a mixture. A checkpoint has them as transformers does, a stack per matrix:
// `X.experts.gate_up_proj` [E, 2F, I] (or `X.experts.up_proj` [E, F, I]) and `X.experts.down_proj` [E, I, F].
// Compressed Tensors has a layer per expert and matrix, as llm-compressor writes and vLLM reads it:
// `X.experts.0.gate_proj` [F, I], `X.experts.0.up_proj`, `X.experts.0.down_proj`, `X.experts.1.gate_proj`,
// ... Legend: E experts, F and I features, R rows of a stack: those of all its experts, one after the other.

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "export/hf_plan.hpp"
#include "qat/checkpoint/checkpoint.hpp"

namespace qat {

/// Whether the tensor is such a stack, by its name and shape.
bool is_expert_stack(const HfTensor& tensor);

/// One layer of a stack: `rows` of its R, from `first` on.
struct ExpertLayer {
  std::string name;  ///< "model.layers.0.experts.3.gate_proj"
  int64_t first;
  int64_t rows;
};

/// The layers of a stack, in the order of its rows.
std::vector<ExpertLayer> expert_layers(const HfTensor& stack);

/// The stacks that layers of these names make up, each with the layers that it needs, in the order of its
/// rows: those of experts 0 to E - 1 when the names have E different numbers, whether they are there or not.
std::map<std::string, std::vector<std::string>> expert_stacks(const std::vector<std::string>& layers);

/// Whether each row of every expert has scales of its own: its groups do not cross rows.
bool has_row_scales(const QuantizedTensor& stack);

/// A layer of a stack with row scales, as a matrix [layer.rows, I] that shares the stack's memory.
QuantizedTensor layer_of(const QuantizedTensor& stack, const ExpertLayer& layer);

}  // namespace qat
