#include "arch/decoder_table.hpp"
#include "arch/families.hpp"

// Qwen2 and Qwen2.5, dense. As llama, with biases on q, k and v, and llama.cpp's half-split rotary embedding,
// so that no row moves. (transformers models/qwen2)

namespace qat::arch {

const Family& qwen2() {
  using enum TensorKind;
  static const Family family{
      .name = "qwen2",
      .model_types = {"qwen2"},
      .hf_class = "Qwen2ForCausalLM",
      .gguf_architecture = "qwen2",
      .tensors =
          decoder_tensors({}, {{"model.layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias", kBias},
                               {"model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias", kBias},
                               {"model.layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias", kBias}}),
      .config = decoder_config("qwen2", Condition::kExplicitHeadDim, {}),
      .gguf_only = {},
      .hf_only = {},
      .norm_offset = 0.0,
      .qk_norm = false,
      .embedding_scale = EmbeddingScale::kOne,
      .activation = "silu",
  };
  return family;
}

}  // namespace qat::arch
