#include "arch/families.hpp"

// Qwen3, dense. As llama, with a norm on queries and keys, a head size of its own, and llama.cpp's half-split
// rotary embedding, so that no row moves. (transformers models/qwen3; llama.cpp
// gguf-py/gguf/tensor_mapping.py, constants.py)

namespace qat::arch {
namespace {

std::vector<TensorRule> tensors() {
  using enum TensorKind;
  using enum RowOrder;
  return {
      {"model.embed_tokens.weight", "token_embd.weight", kEmbedding},
      {"model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight", kNorm},
      {"model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight", kMatrix},
      {"model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight", kMatrix},
      {"model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight", kMatrix},
      {"model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight", kMatrix},
      {"model.layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight", kNorm},
      {"model.layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight", kNorm},
      {"model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", kNorm},
      {"model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight", kMatrix},
      {"model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight", kMatrix},
      {"model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight", kMatrix},
      {"model.norm.weight", "output_norm.weight", kNorm},
      {"lm_head.weight", "output.weight", kHead, kSame, true},
  };
}

std::vector<ConfigKey> config() {
  using enum ValueType;
  using enum Absent;
  using enum Condition;
  return {
      {{"vocab_size"}, "qwen3.vocab_size", kU32},
      {{"max_position_embeddings"}, "qwen3.context_length", kU32},
      {{"hidden_size"}, "qwen3.embedding_length", kU32},
      {{"num_hidden_layers"}, "qwen3.block_count", kU32},
      {{"intermediate_size"}, "qwen3.feed_forward_length", kU32},
      {{"num_attention_heads"}, "qwen3.attention.head_count", kU32},
      {{"num_key_value_heads"}, "qwen3.attention.head_count_kv", kU32, kQueryHeads},
      {{"head_dim"}, "qwen3.attention.key_length", kU32, kHeadDim},
      {{"head_dim"}, "qwen3.attention.value_length", kU32, kHeadDim},
      {{"rms_norm_eps"}, "qwen3.attention.layer_norm_rms_epsilon", kF32},
      {{"rope_parameters.rope_theta", "rope_theta"}, "qwen3.rope.freq_base", kF32, kRopeBase},
      {{"rope_parameters.rope_type", "rope_scaling.rope_type", "rope_scaling.type"},
       "qwen3.rope.scaling.type",
       kString,
       kOmit,
       kScaledRope},
      {{"rope_parameters.factor", "rope_scaling.factor"},
       "qwen3.rope.scaling.factor",
       kF32,
       kError,
       kScaledRope},
      {{"rope_parameters.original_max_position_embeddings", "rope_scaling.original_max_position_embeddings"},
       "qwen3.rope.scaling.original_context_length",
       kU32,
       kOmit,
       kScaledRope},
  };
}

}  // namespace

const Family& qwen3() {
  static const Family family{
      .name = "qwen3",
      .model_types = {"qwen3"},
      .hf_class = "Qwen3ForCausalLM",
      .gguf_architecture = "qwen3",
      .tensors = tensors(),
      .config = config(),
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
