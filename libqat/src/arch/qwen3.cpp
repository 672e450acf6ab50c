#include "arch/decoder_table.hpp"
#include "arch/families.hpp"

// Qwen3, dense. As llama, with a norm on queries and keys, a head size of its own, and llama.cpp's half-split
// rotary embedding, so that no row moves. (transformers models/qwen3)

namespace qat::arch {

const Family& qwen3() {
  using enum TensorKind;
  static const Family family{
      .name = "qwen3",
      .model_types = {"qwen3"},
      .hf_class = "Qwen3ForCausalLM",
      .gguf_architecture = "qwen3",
      .tensors = decoder_tensors(
          {}, {{"model.layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight", kNorm},
               {"model.layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight", kNorm}}),
      .config = decoder_config("qwen3", Condition::kAlways, {}),
      .gguf_only = {},
      .hf_only = {},
      .norm_offset = 0.0,
      .qk_norm = true,
      .embedding_scale = EmbeddingScale::kOne,
      .activation = "silu",
  };
  return family;
}

}  // namespace qat::arch
