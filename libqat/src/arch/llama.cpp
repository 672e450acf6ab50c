#include "arch/families.hpp"

// Llama 1 to 3, SmolLM, and everything else of class LlamaForCausalLM.
// (transformers models/llama; llama.cpp gguf-py/gguf/tensor_mapping.py, constants.py, convert_hf_to_gguf.py)

namespace qat::arch {
namespace {

std::vector<TensorRule> tensors() {
  using enum TensorKind;
  using enum RowOrder;
  return {
      {"model.embed_tokens.weight", "token_embd.weight", kEmbedding},
      {"model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight", kNorm},
      {"model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight", kMatrix, kRopeQueryHeads},
      {"model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight", kMatrix, kRopeKeyHeads},
      {"model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight", kMatrix},
      {"model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight", kMatrix},
      {"model.layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias", kBias, kRopeQueryHeads, true},
      {"model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias", kBias, kRopeKeyHeads, true},
      {"model.layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias", kBias, kSame, true},
      {"model.layers.{i}.self_attn.o_proj.bias", "blk.{i}.attn_output.bias", kBias, kSame, true},
      {"model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", kNorm},
      {"model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight", kMatrix},
      {"model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight", kMatrix},
      {"model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight", kMatrix},
      {"model.layers.{i}.mlp.gate_proj.bias", "blk.{i}.ffn_gate.bias", kBias, kSame, true},
      {"model.layers.{i}.mlp.up_proj.bias", "blk.{i}.ffn_up.bias", kBias, kSame, true},
      {"model.layers.{i}.mlp.down_proj.bias", "blk.{i}.ffn_down.bias", kBias, kSame, true},
      {"model.norm.weight", "output_norm.weight", kNorm},
      {"lm_head.weight", "output.weight", kHead, kSame, true},
  };
}

std::vector<ConfigKey> config() {
  using enum ValueType;
  using enum Absent;
  using enum Condition;
  return {
      {{"vocab_size"}, "llama.vocab_size", kU32},
      {{"max_position_embeddings"}, "llama.context_length", kU32},
      {{"hidden_size"}, "llama.embedding_length", kU32},
      {{"num_hidden_layers"}, "llama.block_count", kU32},
      {{"intermediate_size"}, "llama.feed_forward_length", kU32},
      {{"num_attention_heads"}, "llama.attention.head_count", kU32},
      {{"num_key_value_heads"}, "llama.attention.head_count_kv", kU32, kQueryHeads},
      {{"head_dim"}, "llama.attention.key_length", kU32, kHeadDim, kExplicitHeadDim},
      {{"head_dim"}, "llama.attention.value_length", kU32, kHeadDim, kExplicitHeadDim},
      {{"rms_norm_eps"}, "llama.attention.layer_norm_rms_epsilon", kF32},
      {{"head_dim"}, "llama.rope.dimension_count", kU32, kHeadDim},
      {{"rope_parameters.rope_theta", "rope_theta"}, "llama.rope.freq_base", kF32, kRopeBase},
      {{"rope_parameters.rope_type", "rope_scaling.rope_type", "rope_scaling.type"},
       "llama.rope.scaling.type",
       kString,
       kOmit,
       kScaledRope},
      {{"rope_parameters.factor", "rope_scaling.factor"},
       "llama.rope.scaling.factor",
       kF32,
       kError,
       kScaledRope},
      {{"rope_parameters.original_max_position_embeddings", "rope_scaling.original_max_position_embeddings"},
       "llama.rope.scaling.original_context_length",
       kU32,
       kOmit,
       kScaledRope},
  };
}

}  // namespace

const Family& llama() {
  static const Family family{
      .name = "llama",
      .model_types = {"llama"},
      .hf_class = "LlamaForCausalLM",
      .gguf_architecture = "llama",
      .tensors = tensors(),
      .config = config(),
      .gguf_only = {"rope_freqs.weight"},
      .hf_only = {"model.layers.{i}.self_attn.rotary_emb.inv_freq"},
      .norm_offset = 0.0,
      .qk_norm = false,
      .embedding_scale = EmbeddingScale::kOne,
      .activation = "silu",
  };
  return family;
}

}  // namespace qat::arch
